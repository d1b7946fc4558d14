# The MLflow server of compose.yaml, in the versions that this project is tested with.
FROM python:3.11-slim-bookworm
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

COPY constraints.txt /opt/constraints.txt
RUN pip install --no-cache-dir --constraint /opt/constraints.txt mlflow 'psycopg[binary]' boto3
COPY docker/make_bucket.py /opt/make_bucket.py

RUN useradd --create-home --uid 10001 mlflow
USER 10001
WORKDIR /home/mlflow
EXPOSE 5000
CMD ["mlflow", "server", "--host", "0.0.0.0"]
