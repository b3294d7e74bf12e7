"""Selection: a pure function of the annotations that decides for every text whether it is kept, and why."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from capfilt.extra.load import EMBEDDING
from capfilt.run import Part, Run
from capfilt.schema import SELECTION, USABLE
from capfilt.select import copies, rules
from capfilt.select.concepts import Balance, read_concepts
from capfilt.select.conditions import Conditions, scores_of
from capfilt.select.copies import Copies
from capfilt.select.policies import HUMAN, SOURCES, SYN, WEB, SelectConfig, Texts, choose, cut_of
from capfilt.store.storage import Local

_NAME = re.compile(r"^[\w][\w.\-]*\Z")
_COLUMN = {"itm": "itm_{}", "margin": "itm_margin_{}", "itc": "itc_{}"}


def scored_parts(run: Run) -> list[Part]:
    """Return the finished parts, in the order of the plan."""
    present = run.parts.present()
    return [part for part in run.plan if part.pid in present]


def select(
    run: Run, name: str, config: SelectConfig, *, replace: bool = False, allow_empty: bool = False
) -> dict[str, Any]:
    """Write selections/NAME and return its account. An existing selection that would be the same is left alone.

    ValueError if it exists with other settings, unless `replace`, if nothing is scored yet, or if no text is kept,
    unless `allow_empty`.
    """
    if not _NAME.match(name):
        raise ValueError(f"selection name {name!r}: letters, digits, - _ and . only")
    done = scored_parts(run)
    if not done:
        raise ValueError(f"{run.where}: nothing is scored yet; run `{run.command('score')}` first")
    digest = hashlib.sha256("".join(part.pid for part in done).encode()).hexdigest()[:16]
    settings = dataclasses.asdict(config)
    listed = copies.read_list(config.contamination).digest() if config.contamination else None
    given = given_digest(run, config)
    if run.storage.exists(success(name)):
        before = read_account(run, name)
        planned = dataclasses.asdict(SelectConfig(**before["settings"]))  # older accounts lack newer settings
        same = (planned, before.get("contamination_digest"), before.get("given_digest")) == (settings, listed, given)
        if not same and not replace:
            raise ValueError(f"selection {name} exists with other settings; give another --name, or --replace")
        if same and before["parts_digest"] == digest and is_whole(run, before):
            return _not_empty(before, allow_empty)
        run.storage.remove(success(name))
    whole = survey(run, done, config)
    counts: dict[str, Counter] = {key: Counter() for key in ("rows_in", "texts_in", "kept", "dropped", "reasons")}
    with run.storage.writing(table_name(name)) as file, pq.ParquetWriter(file, SELECTION, compression="zstd") as writer:
        for part in done:
            writer.write_table(select_part(run, part, config, whole, counts))
    account = {
        "name": name,
        "settings": settings,
        "fingerprint": run.fingerprint,
        "parts": len(done),
        "parts_planned": len(run.plan),
        "parts_digest": digest,
        "contamination_digest": listed,
        "given_digest": given,
        **({"concepts": whole.balance.account()} if whole.balance else {}),
        **{key: dict(sorted(counter.items())) for key, counter in counts.items()},
        "files": {table_name(name).rsplit("/", 1)[-1]: run.storage.sha256(table_name(name))},
    }
    try:
        _not_empty(account, allow_empty)
    except ValueError:
        run.storage.remove(table_name(name))
        raise
    run.storage.write(success(name), (json.dumps(account, indent=1) + "\n").encode())
    return account


def _not_empty(account: dict[str, Any], allow_empty: bool) -> dict[str, Any]:
    if not (allow_empty or sum(account["kept"].values())):
        raise ValueError(nothing_kept(account))
    return account


def nothing_kept(account: dict[str, Any]) -> str:
    """Return the message for a selection without texts, with the most common reasons."""
    texts, reasons = sum(account["texts_in"].values()), Counter(account["reasons"]).most_common(3)
    why = "".join(f"; {reason}: {n:,}" for reason, n in reasons)
    return f"selection {account['name']} keeps none of {texts:,} texts{why}. --allow-empty accepts that"


def success(name: str) -> str:
    return f"selections/{name}/_SUCCESS"


def table_name(name: str) -> str:
    return f"selections/{name}/texts.parquet"


def read_account(run: Run, name: str) -> dict[str, Any]:
    """Read the account of a selection. ValueError lists the existing ones, or says that it is damaged."""
    try:
        account = json.loads(run.storage.read(success(name)))
        for key in ("settings", "kept", "dropped", "rows_in", "texts_in", "reasons", "files"):
            account[key].items()
        account["files"]["texts.parquet"], account["parts"], account["parts_digest"], account["name"]
        return account
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, RecursionError):
        where = f"{run.storage.root}/{success(name)}"
        raise ValueError(f"{where} is damaged; remove that folder and select again") from None
    except FileNotFoundError:
        there = ", ".join(selections(run)) or "none"
        raise ValueError(f"{run.where} has no selection {name!r} (there are: {there})") from None


def is_whole(run: Run, account: dict[str, Any]) -> bool:
    """Tell whether the table of a selection exists and is unchanged."""
    name = table_name(account["name"])
    return run.storage.exists(name) and run.storage.sha256(name) == account["files"]["texts.parquet"]


def selections(run: Run) -> list[str]:
    return sorted(n.split("/")[1] for n in run.storage.listing("selections") if n.endswith("/_SUCCESS"))


def given_digest(run: Run, config: SelectConfig) -> str | None:
    """Return a digest of the further scores and the list of concepts that a selection uses; None if it uses none."""
    names = {one.scorer for one in config.conditions()} | ({EMBEDDING} if config.duplicates == EMBEDDING else set())
    given: list[Any] = []
    for parts in (scores_of(run, name) for name in sorted(names)):
        sizes = sorted((pid, size) for pid, (size, _) in parts.present().items())
        given.append([parts.scorer, parts.record()["fingerprint"], sizes])
    if config.concepts:
        given.append(read_concepts(config.concepts).digest())
    return hashlib.sha256(json.dumps(given).encode()).hexdigest()[:16] if given else None


def _columns(config: SelectConfig) -> list[str]:
    names = [_COLUMN[config.column].format(kind) for kind in ("web", "syn")]
    return ["sample_id", "source_uri", "status", "web_text", "web_text_norm", "syn_text", "rule_flags", *names]


@dataclass(frozen=True)
class Whole:
    """Facts about all rows that judging a single one needs."""

    copies: Copies
    cut: float | None = None
    """Score that the best share of all texts reaches, for the policy `fraction`."""
    conditions: Conditions | None = None
    """Conditions on the scores of further scorers."""
    balance: Balance | None = None
    """Counts of the concepts among the texts that are kept but for the balance."""


def survey(run: Run, done: list[Part], config: SelectConfig) -> Whole:
    """Gather the facts that a selection needs from the whole run; reads nothing if it needs none."""
    conditions = Conditions(run, config.conditions()) if config.conditions() else None
    whole = Whole(copies.find(run, done, config), conditions=conditions)
    if config.policy == "fraction":
        scores = []
        for part in done:
            flat = _flat(part, run.parts.read(part.pid, _columns(config)), config, whole)
            scores.append(flat["score"][flat["open"]])
        whole = dataclasses.replace(whole, cut=cut_of(np.concatenate(scores), config.fraction))
    if config.concepts:
        balance = Balance(read_concepts(config.concepts), config.per_concept)
        for part in done:
            flat, kept, *_ = _decide(part, run.parts.read(part.pid, _columns(config)), config, whole)
            balance.count(flat["text"].filter(pa.array(kept & (flat["source"] != HUMAN))).to_pylist())
        whole = dataclasses.replace(whole, balance=balance)
    return whole


def _flat(part: Part, table: pa.Table, config: SelectConfig, whole: Whole) -> dict[str, Any]:
    """Flatten the texts of a part to one entry each, in the order of rows, web before synthetic."""
    parts: dict[str, list] = {key: [] for key in ("row", "source", "index", "score")}
    texts = []
    for kind, name in ((WEB, "web"), (SYN, "syn")):
        column = table[f"{name}_text"].combine_chunks()
        lengths = np.asarray(pc.fill_null(pc.list_value_length(column), 0))
        row = np.repeat(np.arange(len(table)), lengths)
        parts["row"].append(row)
        parts["source"].append(np.full(len(row), kind))
        parts["index"].append(np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths))
        scores = pc.list_flatten(table[_COLUMN[config.column].format(name)].combine_chunks())
        scores = scores.to_numpy(zero_copy_only=False).astype(np.float32)
        # Rows without scores have texts all the same.
        parts["score"].append(scores if len(scores) == len(row) else _spread(table, name, config, row))
        texts.append(pc.list_flatten(column))
    joined = {key: np.concatenate(values) for key, values in parts.items()}
    order = np.lexsort((joined["index"], joined["source"], joined["row"]))
    flat: dict[str, Any] = {key: values[order] for key, values in joined.items()}
    flat["text"] = pa.concat_arrays(texts).take(pa.array(order))
    _judge_open(part, table, flat, config, whole)
    return flat


def _spread(table: pa.Table, name: str, config: SelectConfig, row: np.ndarray) -> np.ndarray:
    """Align scores with texts where some rows have fewer scores than texts."""
    scores = table[_COLUMN[config.column].format(name)].to_pylist()
    texts = table[f"{name}_text"].to_pylist()
    values = [v for s, t in zip(scores, texts, strict=True) for v in [*(s or []), *[None] * (len(t) - len(s or []))]]
    return np.array([np.nan if v is None else v for v in values], dtype=np.float32)


def _judge_open(part: Part, table: pa.Table, flat: dict[str, Any], config: SelectConfig, whole: Whole) -> None:
    """Decide which texts a policy may choose from, with the reason for excluding the others."""
    status = np.asarray(table["status"].to_pylist(), dtype=object)
    usable = np.isin(status.astype(str), USABLE)
    why = np.where(usable, "", np.char.add("status ", status.astype(str)))[flat["row"]].astype(object)
    why[(why == "") & np.isnan(flat["score"])] = "no words"
    for reason, mine in _rules(part, table, flat, config, whole):
        why[mine & (why == "")] = reason
    if config.human:
        human = np.array([fnmatch.fnmatch(uri, config.human) for uri in table["source_uri"].to_pylist()])[flat["row"]]
        flat["source"] = np.where(human & (flat["source"] == WEB), HUMAN, flat["source"])
        why[human & (flat["source"] == SYN) & (why == "")] = "a person's text is there"
    flat["why"] = why
    flat["open"] = (why == "") & (flat["source"] != HUMAN)


def _rules(part: Part, table: pa.Table, flat: dict[str, Any], config: SelectConfig, whole: Whole
           ) -> Iterator[tuple[str, np.ndarray]]:  # fmt: skip
    """Yield reasons to drop texts, with the texts each applies to; the first one counts."""
    others = whole.copies
    if part.pid in others.rows:
        for code, reason in copies.WHY.items():
            yield reason, (others.rows[part.pid] == code)[flat["row"]]
    if part.pid in others.shared:
        mine = flat["source"] == WEB
        mine[mine] = others.shared[part.pid]
        yield f"rule shared>{config.shared}", mine
    for only in config.sources:
        yield f"only {only} texts", flat["source"] == (SYN if only == "web" else WEB)
    if config.rules:
        flags = table["rule_flags"].combine_chunks()
        row_of, flag_of = np.asarray(pc.list_parent_indices(flags)), pc.list_flatten(flags).dictionary_encode()
        for code, flag in enumerate(flag_of.dictionary.to_pylist()):
            if rules.of_preset(config.rules, flag):
                broken = np.zeros(len(table), dtype=bool)
                broken[row_of[np.asarray(flag_of.indices) == code]] = True
                yield f"rule {flag.partition('.')[2]}", broken[flat["row"]] & _covers(flag, flat)
    if whole.conditions:
        kinds = {"web": flat["source"] == WEB, "syn": flat["source"] == SYN}
        yield from whole.conditions.reasons(part, flat["row"], flat["index"], kinds)


def _covers(flag: str, flat: dict[str, Any]) -> np.ndarray:
    """Mark the texts that a flag applies to: all of a row for image rules, one for a rule on a web text."""
    where = flag.partition(".")[0]
    if where == "image":
        return np.ones(len(flat["row"]), dtype=bool)
    return (flat["source"] == WEB) & (flat["index"] == int(where.removeprefix("web") or 0))


def select_part(run: Run, part: Part, config: SelectConfig, whole: Whole, account: dict[str, Counter]) -> pa.Table:
    """Return the selection rows of a part; adds to the account."""
    table = run.parts.read(part.pid, _columns(config))
    flat, kept, rank, reason = _decide(part, table, config, whole)
    if whole.balance:
        among = np.flatnonzero(kept & (flat["source"] != HUMAN))
        ids = table["sample_id"].take(pa.array(flat["row"][among])).to_pylist()
        has, chosen = whole.balance.judge(ids, flat["text"].take(pa.array(among)).to_pylist())
        kept[among] = chosen
        reason[among[~has]] = "rule no concept"
        reason[among[has & ~chosen]] = f"rule above {config.per_concept} per concept"
    n = len(kept)
    names = np.asarray(SOURCES, dtype=object)[flat["source"]]
    _count(account, table, names, kept, reason)
    return pa.table(
        {
            "sample_id": table["sample_id"].take(pa.array(flat["row"])),
            "part_id": pa.repeat(part.pid, n),
            "row": pa.array(flat["row"], pa.int32()),
            "text": flat["text"],
            "text_source": pa.array(names, pa.string()),
            "text_index": pa.array(flat["index"], pa.int32()),
            "score": pa.array(flat["score"], pa.float32(), mask=np.isnan(flat["score"])),
            "rank": pa.array(rank, pa.int32(), mask=rank < 0),
            "kept": pa.array(kept),
            "reason": pa.array(reason, pa.string()),
            "weight": pa.array(np.ones(n, np.float32)),
        },
        schema=SELECTION,
    )


def _decide(
    part: Part, table: pa.Table, config: SelectConfig, whole: Whole
) -> tuple[dict[str, Any], np.ndarray, np.ndarray, np.ndarray]:
    """Return the texts of a part, flat, and whether each is kept but for the balance, its rank, and the reason."""
    flat = _flat(part, table, config, whole)
    chosen = flat["open"]
    verdict = choose(Texts(flat["row"][chosen], flat["source"][chosen], flat["score"][chosen]), config, whole.cut)
    n = len(flat["row"])
    kept, rank = np.zeros(n, dtype=bool), np.full(n, -1)
    kept[chosen], rank[chosen] = verdict.kept, verdict.rank
    reason = flat["why"].copy()
    reason[chosen] = np.asarray(verdict.reasons, dtype=object)[verdict.reason]
    human = (flat["source"] == HUMAN) & (flat["why"] == "")
    kept |= human
    reason[human] = "written by a person"
    return flat, kept, rank, reason


def _count(
    account: dict[str, Counter], table: pa.Table, names: np.ndarray, kept: np.ndarray, reason: np.ndarray
) -> None:
    account["rows_in"].update(table["status"].to_pylist())
    account["texts_in"].update(names.tolist())
    account["kept"].update(names[kept].tolist())
    account["dropped"].update(names[~kept].tolist())
    account["reasons"].update(
        f"{'kept' if k else 'dropped'}: {r}" for k, r in zip(kept.tolist(), reason.tolist(), strict=True)
    )


def kept_of(run: Run, name: str) -> Iterator[tuple[Part, pa.Table]]:
    """Yield the kept texts of each part of a selection, in the order of the plan."""
    read_account(run, name)
    by_pid = {part.pid: part for part in run.plan}
    for table in tables_of(run, name):
        if len(table):
            yield by_pid[table["part_id"][0].as_py()], table.filter(table["kept"])


def tables_of(run: Run, name: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Yield the table of a selection, part by part."""
    path = table_name(name)
    local = isinstance(run.storage, Local)
    file = pq.ParquetFile(run.storage.path(path) if local else pa.BufferReader(run.storage.read(path)))
    for g in range(file.num_row_groups):
        yield file.read_row_group(g, columns)


def account_lines(account: dict[str, Any]) -> list[str]:
    """Format an account for people: every row and text once."""
    rows, texts = sum(account["rows_in"].values()), sum(account["texts_in"].values())
    kept, dropped = sum(account["kept"].values()), sum(account["dropped"].values())
    lines = [f"rows in {rows:,} = " + " + ".join(f"{status} {n:,}" for status, n in account["rows_in"].items())]
    lines.append(f"texts in {texts:,} = kept {kept:,} + dropped {dropped:,}")
    for source, n in account["texts_in"].items():
        lines.append(
            f"  {source}: kept {account['kept'].get(source, 0):,} of {n:,} ({account['kept'].get(source, 0) / n:.1%})"
        )
    lines += [f"  {reason}: {n:,}" for reason, n in account["reasons"].items()]
    if concepts := account.get("concepts"):
        most = ", ".join(f"{name} {n:,} -> {kept:,}" for name, n, kept in concepts["most"][:5])
        lines.append(f"concepts: {concepts['present']:,} of {concepts['listed']:,} are there; most frequent: {most}")
    if account["parts"] < account["parts_planned"]:
        lines.append(f"of {account['parts']:,} parts; {account['parts_planned']:,} are planned")
    return lines
