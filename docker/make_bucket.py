"""Make a bucket where `AWS_ENDPOINT_URL` points, unless it is there: python make_bucket.py NAME"""

import sys

import boto3


def make_bucket(name: str) -> bool:
    """Make the bucket; whether it was missing."""
    store = boto3.client("s3")
    if name in (bucket["Name"] for bucket in store.list_buckets()["Buckets"]):
        return False
    store.create_bucket(Bucket=name)
    return True


if __name__ == "__main__":
    print(f"bucket {sys.argv[1]}: {'made' if make_bucket(sys.argv[1]) else 'is there'}")  # noqa: T201
