# fastdeit on an NVIDIA GPU. The wheels of PyTorch and DALI bring CUDA's libraries: of the host only the driver is used.
#
#   docker build -t fastdeit .
#   docker run --rm --gpus all --ipc=host --user "$(id -u):$(id -g)" -v "$PWD:/data" fastdeit train --data-path photos
#
# Without a GPU, smaller by the CUDA libraries of PyTorch, with the address of PyTorch's CPU wheels as INDEX:
#   docker build --build-arg TORCH_INDEX=INDEX -t fastdeit:cpu .
FROM python:3.12-slim

# Inductor and Triton compile C++ and C when a model is compiled; Python's headers are in this image.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

# A layer of its own, as it is large and seldom changes. Empty: PyTorch comes with what needs it, from PyPI.
ARG TORCH_INDEX=
COPY constraints.txt /opt/fastdeit/
RUN if [ -n "$TORCH_INDEX" ]; then \
        pip install --no-cache-dir --no-deps -i "$TORCH_INDEX" \
            $(grep -E '^(torch|torchvision)==' /opt/fastdeit/constraints.txt); \
    fi

COPY . /opt/fastdeit
RUN cd /opt/fastdeit && pip install --no-cache-dir --constraint constraints.txt '.[train,export]'

# Whoever runs it needs a name and a place for compiled kernels; downloaded weights stay with the data.
ENV HOME=/tmp USER=fastdeit HF_HOME=/data/.cache/huggingface TORCH_HOME=/data/.cache/torch \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /data
ENTRYPOINT ["fastdeit"]
CMD ["--help"]
