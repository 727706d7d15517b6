"""The demo over several seeds: its sentence, and the record's rows."""

from benchmarks import demo


def test_the_sentence_has_the_paired_gain():
    rows = [
        demo.row(seed, {"teacher": 0.855, "cls": 0.8, "dist": 0.8, "both": both, "undistilled": alone})
        for seed, both, alone in ((2, 0.88, 0.80), (3, 0.86, 0.76), (4, 0.80, 0.81))
    ]
    assert rows[0] == {
        "seed": "2", "teacher": "85.50", "cls": "80.00", "dist": "80.00", "both": "88.00", "undistilled": "80.00",
    }  # fmt: skip
    # Gains 8, 10 and -1: mean 17 / 3, standard deviation 5.86, standard error 3.38.
    assert demo.in_words(rows).strip() == (
        "Over 3 seeds the distilled student reaches 84.7 % on average, the one from labels alone 79.0 %: +5.7 ± 3.4 "
        "points (mean and standard error of the differences), and it is better in 2 of 3. Their teacher has 85.5 %."
    )


def test_the_record_was_made_with_other_seeds_than_the_settings():
    assert not {0, 1} & set(demo.SEEDS)
    assert [int(row["seed"]) for row in demo.read()] == list(demo.SEEDS)
