"""Where the pictures of a set lie: the keys that all sets of pictures share."""

from dataclasses import dataclass
from typing import Literal, Self

from pydantic import SecretStr, model_validator

from deepfloyd_core.config.base import HomePath, NameOrPath, Spec
from deepfloyd_core.config.data_blocks import Texts
from deepfloyd_core.config.keys import CONTENT, ENTRY, key


@dataclass(frozen=True)
class SourceType:
    """What the configuration knows of a type of source."""

    needs: tuple[str, ...]  # keys that it cannot do without
    captions: tuple[str, ...] = ()  # the caption strategies whose captions lie with its pictures; the source reads them
    is_folder: bool = False  # its pictures are files in `instance_data_dir`, on this machine


SOURCE_TYPES = {
    "local": SourceType(("instance_data_dir",), ("textfile",), is_folder=True),
    "aws": SourceType(("aws_bucket_name",), ("textfile",)),
    "csv": SourceType(("csv_file", "csv_cache_dir")),
    "parquet": SourceType(("csv_file", "csv_cache_dir")),
    "huggingface": SourceType(("dataset_name",), ("huggingface",)),
    "webdataset": SourceType(("instance_data_dir",), ("textfile",)),
}
URL_TYPES = ("csv", "parquet")


class SourceKeys(Spec):
    """Where the pictures of a set are, and how to read them. These keys are not part of the pictures' identity."""

    id: str = key(min_length=1, says="Name of the data set; part of every ledger row.", makes=ENTRY)
    type: Literal["local", "aws", "csv", "parquet", "huggingface", "webdataset"] = key(
        says="`local`: a directory on this machine. `aws`: a bucket of S3 or another server of its kind. `csv`, "
        "`parquet`: a table of URLs. `huggingface`: a saved data set. `webdataset`: a directory of tar files.",
        makes=CONTENT,
    )
    instance_data_dir: HomePath = key(
        "",
        says="Directory of the pictures or tar files, searched recursively; tar files also at an s3:// URL.",
        makes=CONTENT,
    )
    follow_links: bool = key(
        False,
        says="Follow links that lead out of `instance_data_dir` (`local`), and read files out of the data set that its "
        "rows name (`huggingface`). Links of a Hugging Face cache to its `blobs` are always followed.",
        makes=CONTENT,
    )
    aws_bucket_name: str | None = key(None, min_length=1, says="The bucket of `aws`.", makes=CONTENT)
    aws_data_prefix: str | None = key(
        None, says="Prefix of the pictures in the bucket, searched recursively.", makes=CONTENT
    )
    aws_endpoint_url: str | None = key(
        None, says="Server other than Amazon's, for example https://host:9000.", makes=CONTENT
    )
    aws_region_name: str | None = key(None, says="The bucket's region.", makes=CONTENT)
    aws_access_key_id: SecretStr | None = key(
        None, says="Better set in the environment (AWS_ACCESS_KEY_ID) or by the machine's role.", makes=CONTENT
    )
    aws_secret_access_key: SecretStr | None = key(
        None, says="Better set in the environment (AWS_SECRET_ACCESS_KEY) or by the machine's role.", makes=CONTENT
    )
    csv_file: HomePath | None = key(
        None,
        says="The table of `csv` or `parquet`: a row for each picture; .csv, .tsv, .parquet or .jsonl.",
        makes=CONTENT,
    )
    csv_url_column: str = key("url", says="Its column with the pictures' http or https URLs.", makes=CONTENT)
    csv_caption_column: Texts = key("caption", says="Its column (or columns) with captions.", makes=CONTENT)
    csv_cache_dir: HomePath | None = key(None, says="Directory that keeps the downloaded pictures.", makes=CONTENT)
    csv_user_agent: str | None = key(
        None,
        pattern="^[ -~]+$",
        says="User-Agent of downloads; unset: deepfloyd-pipeline and its version. Some servers require a contact "
        "address in it.",
        makes=CONTENT,
    )
    csv_private_addresses: bool = key(
        False,
        says="Download from loopback, link-local and private addresses, too; else they are refused, also behind "
        "redirects and names.",
        makes=CONTENT,
    )
    dataset_name: NameOrPath | None = key(
        None, says="`huggingface`: a folder made by save_to_disk, or a name or path for load_dataset.", makes=CONTENT
    )
    split: str = key("train", says="`huggingface`: name of the split.", makes=CONTENT)
    image_column: str = key("image", says="`huggingface`: column with the pictures.", makes=CONTENT)
    caption_column: Texts = key("caption", says="`huggingface`: column (or columns) with captions.", makes=CONTENT)

    fallback_caption_column: Texts | None = key(
        None, says="`huggingface`: column (or columns) used where `caption_column` is empty.", makes=CONTENT
    )
    revision: str | None = key(
        None, says="`huggingface`: branch, tag or commit on the hub; unset: its main one.", makes=CONTENT
    )

    @model_validator(mode="after")
    def _named(self) -> Self:
        missing = [key for key in SOURCE_TYPES[self.type].needs if not getattr(self, key)]
        if missing:
            raise ValueError(f"type is {self.type!r}, and {missing[0]} is missing")
        return self
