# The example training job: torch, the agent, and a compiler for the CPU kernel. Context: the repository.
# torch comes with its CUDA libraries, several GB; PIP_EXTRA_INDEX_URL may name an index that has CPU builds.
FROM python:3.11.13-slim-bookworm
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/fp8scope
WORKDIR /src
COPY requirements.lock ./
COPY fp8core fp8core
COPY protos protos
COPY agent agent
ARG PIP_EXTRA_INDEX_URL
RUN /opt/fp8scope/bin/pip install --no-cache-dir --constraint requirements.lock \
    "./fp8core[torch]" ./protos ./agent rich

# The cache folder exists before a volume is mounted there, so that the volume belongs to the user.
RUN useradd --uid 10001 --create-home fp8scope && install -d -o fp8scope -g fp8scope /home/fp8scope/.cache
WORKDIR /home/fp8scope
COPY examples examples
ENV PATH=/opt/fp8scope/bin:$PATH PYTHONUNBUFFERED=1
USER fp8scope
CMD ["python", "examples/train_gpt.py"]
