"""The annotations: one row per input image, scored or not, with the reason if not."""

from __future__ import annotations

import pyarrow as pa

from blip.errors import BadSample

VERSION = 2

OK, NO_TEXT = "ok", "no_text"
USABLE = (OK, NO_TEXT)
"""Statuses of rows whose image was scored; `no_text` has synthetic texts only."""
STATUSES = (
    OK,
    NO_TEXT,
    "decode_error",
    "truncated",
    "too_large",
    "no_image",
    "rule",
    "gpu_oom",
    "crash",
    "timeout",
    "score_invalid",
    "source_error",
)
FAULTS = frozenset(STATUSES) - {*USABLE, "rule"}
"""Statuses of rows that could not be used; rows excluded by a rule are not among them."""
ERROR_CODES = (
    "empty_file",
    "html_page",
    "git_lfs_pointer",
    "xml_or_svg",
    "other_format",
    "no_decoder",
    "not_an_image",
    "truncated",
    "too_many_pixels",
    "too_many_bytes",
    "too_much_memory",
    "too_much_work",
    "decoder_error",
    "no_image",
    "missing_file",
    "path_refused",
    "unreadable",
    "decoder_crashed",
    "decoder_timeout",
    "out_of_memory",
    "not_finite",
    "rule",
)
STATUS_OF = (
    dict.fromkeys(("truncated",), "truncated")
    | dict.fromkeys(("too_many_pixels", "too_many_bytes", "too_much_memory", "too_much_work"), "too_large")
    | dict.fromkeys(("no_image", "missing_file", "path_refused", "not_a_file"), "no_image")
    | {"unreadable": "source_error"}
)
"""The status of a row whose image cannot be used, by the code of the error; `decode_error` for all others."""
_SAME_CODE = {"not_a_file": "unreadable"}


def problem(error: BadSample) -> tuple[str, str, str]:
    """Return (status, error code, detail) of a row whose image cannot be used."""
    return STATUS_OF.get(error.code, "decode_error"), _SAME_CODE.get(error.code, error.code), error.reason


_texts, _floats, _counts = pa.list_(pa.string()), pa.list_(pa.float32()), pa.list_(pa.int32())

ANNOTATIONS = pa.schema(
    [
        ("sample_id", pa.string()),  # hex of SHA-256(path under the input root, row, key)
        ("source_uri", pa.string()),  # path under the input root
        ("source_row", pa.int64()),
        ("key", pa.string()),
        ("image_sha256", pa.string()),  # of the encoded bytes; null where there are none
        ("phash64", pa.string()),  # hex of the perceptual hash; null where nothing was decoded
        ("url", pa.string()),
        ("extra_json", pa.string()),  # other columns of the input, as a JSON object
        ("width", pa.int32()),  # pixels, upright
        ("height", pa.int32()),
        ("format", pa.string()),
        ("n_frames", pa.int32()),  # of a GIF up to 10,000
        ("bytes", pa.int64()),
        ("status", pa.string()),  # one of STATUSES
        ("error_code", pa.string()),  # one of ERROR_CODES
        ("error_detail", pa.string()),
        ("web_text", _texts),  # as found; web lists are parallel, and so are syn lists
        ("web_text_norm", _texts),  # what the filter saw; null where no word was left
        ("web_tokens", _counts),  # word pieces, before any were cut off
        ("web_truncated", pa.list_(pa.bool_())),
        ("syn_text", _texts),
        ("syn_logprob", _floats),  # sum over the tokens
        ("syn_tokens", _counts),
        ("syn_finish", _texts),  # eos or max_len
        ("itm_web", _floats),  # softmax P(match)
        ("itm_syn", _floats),
        ("itm_margin_web", _floats),  # logit of match minus logit of no match
        ("itm_margin_syn", _floats),
        ("itc_web", _floats),  # cosine
        ("itc_syn", _floats),
        ("rule_flags", _texts),
        ("part_id", pa.string()),
        ("attempt", pa.int32()),
        ("worker", pa.string()),
        ("device", pa.string()),
        ("dtype", pa.string()),
        ("seconds", pa.float32()),  # of the whole part, over its rows
    ]
)
RUN_COLUMNS = ("attempt", "worker", "device", "seconds")
"""Columns on how a row was produced; only these may differ between two runs of one plan."""

SELECTION = pa.schema(
    [
        ("sample_id", pa.string()),
        ("part_id", pa.string()),
        ("row", pa.int32()),  # of the annotation in its part
        ("text", pa.string()),
        ("text_source", pa.string()),  # web, syn or human
        ("text_index", pa.int32()),  # which of the row's texts of that source
        ("score", pa.float32()),  # what the policy looked at
        ("rank", pa.int32()),  # among the row's texts, 0 the best; null where not ranked
        ("kept", pa.bool_()),
        ("reason", pa.string()),
        ("weight", pa.float32()),
    ]
)
