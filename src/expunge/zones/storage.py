"""A zone on disk: public parts readable, each subject's block sealed with a key of its own that lies elsewhere.

In the model folder, beside the base: ``zone.json`` (kind, options, constants, digests), ``zone.safetensors`` (public
arrays), ``zone-blocks.safetensors`` (one ciphertext per subject, under a salted name). Beside the model folder, or
where EXPUNGE_ZONE_KEYS points: ``zone-<id>.keys.json`` with the salt and the keys. A block whose key is gone stays
closed for ever, in every copy and backup of the folder: that is how a subject is erased where rows cannot be reached.

AES-256-GCM (NIST SP 800-38D). The nonce is derived from key and content, so that it repeats only for equal content.
A block that loses or gains a row gets a new key, so that the old key can be destroyed with what it covers.

A zone that is released with noise has the seeds of that noise in ``zone-<id>.noise.json`` beside the keys: whoever
checks the release needs it, whoever serves it must not have it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from safetensors import SafetensorError
from safetensors.numpy import load as unpack
from safetensors.numpy import save as pack
from torch import nn

from expunge.errors import UserError, unknown
from expunge.files import write_json
from expunge.models.folder import read_json
from expunge.options import configure
from expunge.zones.zone import Array, Block, Public, Record, Row, Zone, get_zone

MANIFEST, ARRAYS, BLOCKS = "zone.json", "zone.safetensors", "zone-blocks.safetensors"
SCHEMA, KEYS_SCHEMA, NOISE_SCHEMA = "expunge.zone/1", "expunge.zone-keys/1", "expunge.zone-noise/1"
KEPT = ""  # stands for the subject in the name of what a zone keeps beside its blocks; no subject is called so
KEYS_VARIABLE = "EXPUNGE_ZONE_KEYS"  # a folder, or the key file itself


def digest_weights(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of all parameters and buffers that are saved."""
    state = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        state.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        state.update(value.view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return state.hexdigest()


def block_name(salt: str, subject: str) -> str:
    """The name under which a subject's block is stored: salted, so that it tells nothing without the key file."""
    return hmac.new(bytes.fromhex(salt), b"block/" + subject.encode(), hashlib.sha256).hexdigest()[:32]


def key_file(salt: str, folder: Path) -> Path:
    """Where the keys of the zone with this salt lie that belongs to this model folder."""
    return _keys_place(folder, hashlib.sha256(bytes.fromhex(salt)).hexdigest()[:16])


def _keys_place(folder: Path, zone_id: str) -> Path:
    given = os.environ.get(KEYS_VARIABLE)
    place = Path(given).expanduser() if given else folder.resolve().parent
    return place if place.suffix == ".json" else place / f"zone-{zone_id}.keys.json"


# -- blocks as bytes ---------------------------------------------------------------------------------------------------


def pack_block(block: Block) -> bytes:
    """Records as JSON and tensors in safetensors; the same rows give the same bytes."""
    rows = block.sorted()
    records = [{**asdict(row.record), "source": row.source} for row in rows]
    head = json.dumps({"subject": block.subject, "records": records}, sort_keys=True).encode()
    arrays: dict[str, Array] = {"head": np.frombuffer(head, dtype=np.uint8)}
    for number, row in enumerate(rows):
        arrays |= {f"{number}/{name}": np.ascontiguousarray(value) for name, value in row.tensors.items()}
    arrays |= {f"solved/{name}": np.ascontiguousarray(value) for name, value in block.solved.items()}
    return bytes(pack(arrays))


def unpack_block(data: bytes) -> Block:
    """The inverse of :func:`pack_block`."""
    arrays = unpack(data)
    head = json.loads(arrays.pop("head").tobytes())
    tensors: dict[str, dict[str, Array]] = {}
    for name, value in arrays.items():
        where, _, inner = name.partition("/")
        tensors.setdefault(where, {})[inner] = value
    block = Block(head["subject"], solved=tensors.get("solved", {}))
    for number, fields in enumerate(head["records"]):
        source = fields.pop("source")
        fields |= {"owners": tuple(fields["owners"]), "ids": tuple(fields["ids"])}
        record = Record(**{**fields, "names": tuple(map(tuple, fields["names"]))})
        block.rows[record.id] = Row(record, tensors.get(str(number), {}), source)
    return block


def seal(data: bytes, key: bytes, name: str) -> bytes:
    """Nonce and ciphertext; bound to the block's name, so that blocks cannot be exchanged."""
    nonce = hmac.new(key, b"nonce/" + data, hashlib.sha256).digest()[:12]
    return nonce + AESGCM(key).encrypt(nonce, data, name.encode())


def unseal(data: bytes, key: bytes, name: str) -> bytes:
    """Raises UserError when key and block do not belong together, or a byte was changed."""
    try:
        return AESGCM(key).decrypt(data[:12], data[12:], name.encode())
    except (InvalidTag, ValueError) as error:
        raise UserError(
            f"zone block '{name}' does not open with its key: the block or the key file was changed; copy both again."
        ) from error


# -- a zone in a folder ------------------------------------------------------------------------------------------------


def save_zone(zone: Zone, folder: Path) -> Path:
    """Write the zone beside the base's files in ``folder``, and the keys beside the folder; where the keys are."""
    sealed = dict(zone.sealed)
    counts: dict[str, int | None] = dict.fromkeys(sealed)
    keys: dict[str, bytes] = {}
    for subject, block in sorted(zone.blocks.items()):
        name = block_name(zone.salt, subject)
        keys[name] = zone.keys.setdefault(name, secrets.token_bytes(32))
        sealed[name] = seal(pack_block(block), keys[name], name)
        counts[name] = len(block.rows)
    if zone.kept:
        name = block_name(zone.salt, KEPT)
        keys[name], counts[name] = zone.keys.setdefault(name, secrets.token_bytes(32)), None
        sealed[name] = seal(bytes(pack({k: np.ascontiguousarray(v) for k, v in zone.kept.items()})), keys[name], name)
    (folder / ARRAYS).write_bytes(pack({k: np.ascontiguousarray(v) for k, v in zone.public.arrays.items()}))
    (folder / BLOCKS).write_bytes(pack({k: np.frombuffer(v, dtype=np.uint8) for k, v in sealed.items()}))
    path = key_file(zone.salt, folder)
    manifest = {
        "schema": SCHEMA,
        "id": hashlib.sha256(bytes.fromhex(zone.salt)).hexdigest()[:16],
        "kind": zone.kind,
        "options": asdict(zone.options),
        "base": zone.base_digest,
        "constants": dict(zone.public.constants),
        "public": zone.public.digest(),
        "public_texts": sorted(zone.public.texts),
        "digest": zone.digest() if not zone.sealed else None,
        "blocks": {n: {"records": counts[n], "sha256": hashlib.sha256(sealed[n]).hexdigest()} for n in sorted(sealed)},
    }
    write_json(folder / MANIFEST, manifest)
    write_json(path, {"schema": KEYS_SCHEMA, "salt": zone.salt, "keys": {n: k.hex() for n, k in sorted(keys.items())}})
    path.chmod(0o600)
    if zone.noise:
        noise = noise_file(path)
        write_json(noise, {"schema": NOISE_SCHEMA, "seeds": zone.noise})
        noise.chmod(0o600)
    return path


def is_zone(folder: Path) -> bool:
    """Whether the model folder holds a zone."""
    return (folder / MANIFEST).is_file()


def load_zone(folder: Path, base: nn.Module) -> Zone:
    """The zone in ``folder``; blocks without a key stay in ``zone.sealed``.

    Raises:
        UserError: a file is missing, damaged or of another schema, or the base is not the zone's.
    """
    manifest = read_json(folder / MANIFEST)
    if manifest.get("schema") != SCHEMA:
        raise UserError(f"'{folder / MANIFEST}' has schema '{manifest.get('schema')}': this version reads {SCHEMA}.")
    try:
        kind = get_zone(manifest["kind"])
        options = configure(kind.options, manifest["options"], f"option of zone {kind.name}")
        arrays, blocks = _tensors(folder / ARRAYS), _tensors(folder / BLOCKS)
        public = Public(arrays=arrays, constants=manifest["constants"], texts=frozenset(manifest["public_texts"]))
        listed, recorded, base_digest, zone_id = (manifest[k] for k in ("blocks", "public", "base", "id"))
        hashes = {name: entry["sha256"] for name, entry in listed.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"'{folder / MANIFEST}' is damaged (no usable {error}): copy the file again.") from error
    if public.digest() != recorded:
        raise UserError(
            f"the public parts of the zone in '{folder}' are not those in {MANIFEST}: copy the folder again."
        )
    if {n: hashlib.sha256(b.tobytes()).hexdigest() for n, b in blocks.items()} != hashes:
        raise UserError(f"the blocks of the zone in '{folder}' are not those in {MANIFEST}: copy the folder again.")
    if digest_weights(base) != base_digest:
        raise UserError(
            f"the base in '{folder}' is not the one that its zone was built on (or is loaded in another dtype): the "
            "rows of a zone fit one base only; copy the folder again."
        )
    path = _keys_place(folder, zone_id)
    salt, keys = _read_keys(path)
    zone = kind.build(options, public, base_digest, salt)
    zone.noise = _read_noise(noise_file(path))
    for name, data in blocks.items():
        if name in keys and name == block_name(salt, KEPT):
            zone.kept, zone.keys[name] = dict(unpack(unseal(data.tobytes(), keys[name], name))), keys[name]
        elif name in keys:
            block = unpack_block(unseal(data.tobytes(), keys[name], name))
            zone.blocks[block.subject], zone.keys[name] = block, keys[name]
        else:
            zone.sealed[name] = data.tobytes()
    return zone


def _tensors(path: Path) -> Mapping[str, Array]:
    try:
        return dict(unpack(path.read_bytes()))
    except (OSError, SafetensorError) as error:
        raise UserError(f"'{path}' is missing or damaged: copy the file again.") from error


def _read_keys(path: Path) -> tuple[str, dict[str, bytes]]:
    """Salt and keys; without the file an empty salt and no key, so that all blocks are closed."""
    if not path.is_file():
        return "", {}
    content = read_json(path)
    try:
        if content["schema"] != KEYS_SCHEMA:
            raise UserError(f"'{path}' has schema '{content['schema']}': this version reads {KEYS_SCHEMA}.")
        return str(bytes.fromhex(content["salt"]).hex()), {n: bytes.fromhex(k) for n, k in content["keys"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"'{path}' is no key file of a zone: give the one that was written beside the model."
        ) from error


def noise_file(keys: Path) -> Path:
    """Where the seeds of a zone's noise lie: beside its key file."""
    return keys.with_name(f"{keys.name.removesuffix('.json').removesuffix('.keys')}.noise.json")


def _read_noise(path: Path) -> dict[str, str]:
    """The seeds; none when the file is gone, as it should be once the release has been checked."""
    if not path.is_file():
        return {}
    content = read_json(path)
    try:
        if content["schema"] == NOISE_SCHEMA:
            return {str(int(group)): bytes.fromhex(seed).hex() for group, seed in content["seeds"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        pass
    raise UserError(f"'{path}' holds no seeds of a zone's noise: copy the file again, or delete it.")


def destroy_key(path: Path, subject: str) -> None:
    """Take a subject's key out of a key file: its block is unreadable from then on, in every copy of the folder.

    Copies of the key file itself are out of reach; whoever keeps any must destroy the key there too.

    Raises:
        UserError: no key file, or no key of that subject in it.
    """
    salt, keys = _read_keys(path)
    if not salt:
        raise UserError(f"'{path}' is no key file of a zone: give the one that was written beside the model.")
    name = block_name(salt, subject)
    if name not in keys:
        raise unknown("subject", subject, [])
    del keys[name]
    write_json(path, {"schema": KEYS_SCHEMA, "salt": salt, "keys": {n: k.hex() for n, k in sorted(keys.items())}})
    path.chmod(0o600)
