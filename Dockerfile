# The demo in a container, offline once it is built; not built in the checks, which have no docker.
#   docker build -t specbasis .
#   docker run --rm --network none -v "$PWD/out:/specbasis/out" specbasis
#   docker run --rm specbasis specbasis doctor
FROM python:3.12-slim
RUN apt-get update && apt-get install --yes --no-install-recommends make && rm -rf /var/lib/apt/lists/*
WORKDIR /specbasis
ENV PIP_NO_CACHE_DIR=1
# What is locked comes first: a change of the source installs none of it again.
COPY Makefile ./
COPY requirements requirements
RUN make .venv/torch.stamp
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN make .venv/demo.stamp
ENV PATH=/specbasis/.venv/bin:$PATH HF_HUB_OFFLINE=1
CMD ["make", "demo"]
