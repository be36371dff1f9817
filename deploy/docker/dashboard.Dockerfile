# The dashboard: streamlit, and the collector's read models; no torch. Context: the repository.
FROM python:3.11.13-slim-bookworm AS build
RUN python -m venv /opt/fp8scope
WORKDIR /src
COPY requirements.lock ./
COPY fp8core fp8core
COPY protos protos
COPY collector collector
COPY dashboard dashboard
RUN /opt/fp8scope/bin/pip install --no-cache-dir --constraint requirements.lock \
    ./fp8core ./protos ./collector ./dashboard

FROM python:3.11.13-slim-bookworm
RUN useradd --uid 10001 --create-home fp8scope
COPY --from=build /opt/fp8scope /opt/fp8scope
ENV PATH=/opt/fp8scope/bin:$PATH PYTHONUNBUFFERED=1
USER fp8scope
WORKDIR /home/fp8scope
EXPOSE 8501
CMD ["python", "-m", "fp8scope_dashboard"]
