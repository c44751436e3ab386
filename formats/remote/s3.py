"""Read and write objects of S3 and compatible storage through botocore.

Credentials, region and endpoint come from where AWS's own tools find them. Objects are read by range, in the version of the first
request.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from mmap import mmap
from typing import Any, Protocol, cast

from formats.errors import UserError
from formats.remote.http import PASSING, seconds
from formats.remote.retry import RetryableError, RetryPolicy, fill, words
from formats.remote.store import Status, StoreBase, changed, optional_import, refused, resized
from formats.urls import without_secrets

type Reply = Mapping[str, Any]

_CONNECTIONS = 32
_MAY_WRITE = "check the AWS credentials (`aws configure`, AWS_PROFILE), and s3:PutObject, s3:DeleteObject, s3:ListBucket"
_CREDENTIALS = "check the name, the AWS credentials (`aws configure`, AWS_PROFILE), and s3:GetObject and s3:ListBucket"


class Client(Protocol):
    """The used methods of botocore's client, which has no types."""

    def get_object(self, **arguments: Any) -> Reply: ...
    def head_object(self, **arguments: Any) -> Reply: ...
    def list_objects_v2(self, **arguments: Any) -> Reply: ...
    def put_object(self, **arguments: Any) -> Reply: ...
    def delete_object(self, **arguments: Any) -> Reply: ...
    def create_multipart_upload(self, **arguments: Any) -> Reply: ...
    def upload_part(self, **arguments: Any) -> Reply: ...
    def complete_multipart_upload(self, **arguments: Any) -> Reply: ...
    def abort_multipart_upload(self, **arguments: Any) -> Reply: ...
    def create_bucket(self, **arguments: Any) -> Reply: ...
    def close(self) -> None: ...


class S3(StoreBase):
    """The objects below `s3://bucket/prefix`. Without credentials, requests go unsigned, as public buckets allow."""

    def __init__(self, url: str, policy: RetryPolicy) -> None:
        self.bucket, self.start = bucket_and_prefix(url)
        self.label = without_secrets(url).rstrip("/")
        self.client = open_client(policy)

    def status(self, path: str) -> Status | None:
        try:
            reply = self.client.head_object(Bucket=self.bucket, Key=self.start + path, ChecksumMode="ENABLED")
        except Exception as error:
            if status_of(error) == 404:
                return None
            raise user_error(error, f"{self.label}/{path}") from None
        if "ContentLength" not in reply or "ETag" not in reply:
            raise RetryableError("the answer about an object was cut off")
        return Status(int(reply["ContentLength"]), str(reply["ETag"]), sha256=_whole_sha256(reply))

    def fetch(self, path: str, status: Status, offset: int, out: memoryview) -> None:
        part = f"bytes={offset}-{offset + len(out) - 1}"
        try:
            reply = self.client.get_object(Bucket=self.bucket, Key=self.start + path, Range=part, IfMatch=status.tag)
        except Exception as error:
            raise self._other(error, path, status) from None
        with closing(reply["Body"]) as body:
            if reply["ETag"] != status.tag:
                raise changed(path, status, str(reply["ETag"]))
            if not str(reply.get("ContentRange", "")).startswith(f"bytes {offset}-{offset + len(out) - 1}/"):
                raise RetryableError("the server answered with another range than it was asked for")
            fill(out, body.readinto, (Exception,))  # urllib3's and botocore's, which have no base in common

    def children(self, prefix: str) -> list[str]:
        keys: set[str] = set()
        for page in self._pages(Prefix=self.start + prefix, Delimiter="/"):
            keys |= {str(item["Key"]) for item in page.get("Contents", ())}
            keys |= {str(item["Prefix"]) for item in page.get("CommonPrefixes", ())}
        return sorted(key.removeprefix(self.start + prefix) for key in keys if key != self.start + prefix)

    def files(self, prefix: str) -> Mapping[str, Status | None]:
        """Objects that have a SHA-256 are looked at on their own: the listing does not tell it."""
        return {
            str(item["Key"]).removeprefix(self.start): None
            if "SHA256" in item.get("ChecksumAlgorithm", ())
            else Status(int(item["Size"]), str(item["ETag"]))
            for page in self._pages(Prefix=self.start + prefix)
            for item in page.get("Contents", ())
            if not str(item["Key"]).endswith("/")
        }

    def begin(self, path: str) -> str:
        """An upload in parts; its number."""
        return str(self._write(self.client.create_multipart_upload, path)["UploadId"])

    def part(self, path: str, upload: str, number: int, data: mmap) -> str:
        """One part, counted from 1; its tag. The server checks it against a checksum."""
        data.seek(0)  # botocore reads it as a file, without a copy of all of it
        return str(self._write(self.client.upload_part, path, UploadId=upload, PartNumber=number, Body=data)["ETag"])

    def finish(self, path: str, upload: str, tags: Sequence[str]) -> bool:
        """Make the object out of its parts; False if there is no such upload, because it was finished or dropped."""
        parts = [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(tags, 1)]
        arguments = {"Bucket": self.bucket, "Key": self.start + path, "UploadId": upload, "MultipartUpload": {"Parts": parts}}
        try:
            self.client.complete_multipart_upload(**arguments)
        except Exception as error:
            if status_of(error) == 404:
                return False
            raise user_error(error, f"{self.label}/{path}", doing="write") from None
        return True

    def drop(self, path: str, upload: str) -> None:
        """Forget an upload and its parts."""
        self._write(self.client.abort_multipart_upload, path, gone=True, UploadId=upload)

    def put(self, path: str, data: bytes) -> None:
        self._write(self.client.put_object, path, Body=data)

    def delete(self, path: str) -> None:
        self._write(self.client.delete_object, path, gone=True)

    def close(self) -> None:
        self.client.close()

    def _write(self, call: Callable[..., Reply], path: str, *, gone: bool = False, **arguments: Any) -> Reply:
        """A call that changes something; with `gone`, what is not there any more is fine."""
        try:
            return call(Bucket=self.bucket, Key=self.start + path, **arguments)
        except Exception as error:
            if gone and status_of(error) == 404:
                return {}
            raise user_error(error, f"{self.label}/{path}", doing="write") from None

    def _pages(self, **arguments: Any) -> list[Reply]:
        pages: list[Reply] = []
        more: dict[str, Any] = {}
        while not pages or more:
            try:
                pages.append(self.client.list_objects_v2(Bucket=self.bucket, **arguments, **more))
            except Exception as error:
                raise user_error(error, self.label) from None
            if "IsTruncated" not in pages[-1]:  # which each list says, and one without a body does not
                raise RetryableError("the list of objects was cut off")
            following = pages[-1].get("NextContinuationToken")
            more = {"ContinuationToken": following} if following else {}
        return pages

    def _other(self, error: Exception, path: str, status: Status) -> Exception:
        """Why a range was not given: often because the object is another by now."""
        match status_of(error):
            case 412:
                now = self.status(path)
                return changed(path, status, now.tag if now else "gone")
            case 416:
                return resized(path, status, "less")
            case 404:
                return changed(path, status, "gone")
            case _:
                return user_error(error, f"{self.label}/{path}")


def bucket_and_prefix(url: str) -> tuple[str, str]:
    """Return the bucket, and the prefix with a slash at its end unless it is empty, without user and query."""
    bucket, _, prefix = without_secrets(url).partition("://")[2].partition("/")
    if not re.fullmatch(r"[\w.:-]{3,222}", bucket):
        raise UserError("that URL names no bucket", hint="it should look like `s3://bucket/folder`")
    prefix = prefix.strip("/")
    return bucket, f"{prefix}/" if prefix else ""


def open_client(policy: RetryPolicy) -> Client:
    """Return a client that threads may share. It does not retry: formats/remote/retry.py does, for all kinds of storage."""
    session = optional_import("botocore.session").get_session()
    try:
        unsigned = {} if session.get_credentials() else {"signature_version": optional_import("botocore").UNSIGNED}
        config = optional_import("botocore.config").Config(
            connect_timeout=min(10.0, policy.silence),
            read_timeout=policy.silence,
            retries={"total_max_attempts": 1, "mode": "standard"},
            max_pool_connections=_CONNECTIONS,
            response_checksum_validation="when_required",
            **unsigned,
        )
        region = session.get_config_variable("region") or "us-east-1"
        return cast("Client", session.create_client("s3", region_name=region, config=config))
    except ValueError:  # whose text holds the URL
        raise UserError("AWS's client cannot use its endpoint: it is not a URL", hint="check AWS_ENDPOINT_URL") from None
    except Exception as error:
        raise user_error(error, "s3://") from None


def status_of(error: Exception) -> int:
    """Return the HTTP status of a botocore error; 0 if it has none."""
    response: Any = getattr(error, "response", None)
    match response:
        case {"ResponseMetadata": {"HTTPStatusCode": int(status)}}:
            return status
        case _:
            return 0


def user_error(error: Exception, label: str, *, doing: str = "read") -> Exception:
    """Return RetryableError or UserError, without URLs, for a botocore error; any other error itself."""
    errors = optional_import("botocore.exceptions")
    status = status_of(error)
    if isinstance(error, errors.ClientError):
        reply: Any = getattr(error, "response", {})
        code = str(reply.get("Error", {}).get("Code", ""))
        if status in PASSING or code in ("SlowDown", "RequestTimeout", "InternalError"):
            headers = reply.get("ResponseMetadata", {}).get("HTTPHeaders", {})
            return RetryableError(f"the server answered HTTP {status}", wait=seconds(headers.get("retry-after", "")))
        return refused(status, label, code=code, hint=_CREDENTIALS if doing == "read" else _MAY_WRITE, doing=doing)
    if isinstance(error, (errors.HTTPClientError, errors.ConnectionError, OSError)):
        return RetryableError(words(error))
    if isinstance(error, errors.BotoCoreError):
        return UserError(f"AWS's client cannot {doing} `{label}`: {words(error)}", hint=_CREDENTIALS)
    return error


def _whole_sha256(reply: Reply) -> str | None:
    """The hash of the whole object, where one is stored; uploads in parts have one of their parts' hashes instead."""
    stored = str(reply.get("ChecksumSHA256", ""))
    if not stored or "-" in stored or reply.get("ChecksumType", "FULL_OBJECT") != "FULL_OBJECT":
        return None
    return base64.b64decode(stored).hex()
