from ..command import run
from . import main

run(main)
