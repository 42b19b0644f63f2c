"""What is encoded ahead equals what is encoded when it is shown, in a ring that never outgrows its limit."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.data.encoding import encode
from sfumato.data.encoding.batch_sampler import BatchSampler
from sfumato.data.encoding.ring_dataset import RingDataset
from sfumato.data.encoding.streaming_dataset import StreamingDataset
from sfumato.data.encoding.views import EncodingOptions
from sfumato.data.sources.sample import Sample
from sfumato.data.store.store import Store
from sfumato.errors import Failed, Refused

HOW = EncodingOptions("codec", batch=4, use_store=False, flip=True)
BYTES = 2 * 3 * 4 * 4 * 4  # mean and deviation of one picture


def look(pixels):
    """A network that counts, and whose answer depends on what is encoded together."""
    look.count += len(pixels)
    mean = torch.nn.functional.avg_pool2d(pixels, 4)
    return {"mean": mean + 1e-6 * pixels.mean(), "std": mean.abs()}


def streamed(root, count=24):
    samples = []
    for index in range(count):
        (root / "pictures").mkdir(exist_ok=True)
        file = root / "pictures" / f"{index:02d}.png"
        noise = np.random.default_rng(index).integers(0, 255, (16, 16, 3), np.uint8)
        Image.fromarray(noise).save(file)
        samples.append(Sample(file.name, (f"number {index}",), file=file))
    look.count = 0
    return encode.encode_to_store(Store(root / "store"), samples, (16, 16), look, None, HOW)


def ringed(plain, root, limit):
    named = {one.name: getattr(plain, one.name) for one in fields(StreamingDataset)}
    found = RingDataset(**named, ring=root / "ring", limit=limit)
    order = BatchSampler(found.buckets, 4, seed=5)

    def asked(step):
        indices, epoch = order.at(step)
        return [(indices[:2], epoch), (indices[2:], epoch)]

    found.start_prefetch(asked, order.largest, 5)
    return found, order


def walk(data, order, steps, size=lambda: None):
    """What the steps show, both parts of each."""
    seen = []
    for step in steps:
        indices, epoch = order.at(step)
        if isinstance(data, RingDataset):
            data.prefetch(step)
        seen += [data.read(indices[:2], 5, epoch).latents, data.read(indices[2:], 5, epoch).latents]
        size()
    return seen


def bytes_in(folder: Path) -> int:
    shards = folder.rglob("*.safetensors")
    return sum(shard.stat().st_size for shard in shards)


@pytest.mark.parametrize("rooms", [1, 2, 9])
def test_a_ring_shows_what_a_stream_shows_also_after_it_was_stopped(rooms, tmp_path):
    plain = streamed(tmp_path)
    found, order = ringed(plain, tmp_path, rooms * 4 * BYTES)
    truth = walk(plain, order, range(20))
    sizes = []
    first = walk(found, order, range(11), lambda: sizes.append(bytes_in(tmp_path / "ring")))
    found.close()
    again, _ = ringed(plain, tmp_path, rooms * 4 * BYTES)
    rest = walk(again, order, range(9, 20))
    again.close(finished=True)
    assert all(map(torch.equal, first, truth[:22])) and all(map(torch.equal, rest, truth[18:]))
    headers = 700 * 2 * rooms
    assert max(sizes) <= rooms * 4 * BYTES + headers
    assert not (tmp_path / "ring").exists()


def test_what_lies_in_the_ring_is_not_encoded_again(tmp_path):
    plain = streamed(tmp_path)
    found, order = ringed(plain, tmp_path, 100 * 4 * BYTES)
    walk(found, order, range(3))
    found._worker.pool.submit(lambda: None).result()
    found.close()
    again, _ = ringed(plain, tmp_path, 100 * 4 * BYTES)
    look.count = 0
    seen = [again.read(order.at(step)[0][:2], 5, order.at(step)[1]).latents for step in range(10, 20)]
    assert look.count == 0
    again.close()
    assert all(map(torch.equal, seen, walk(plain, order, range(10, 20))[::2]))


def test_a_limit_below_one_step_is_refused_and_a_flipped_byte_is_found(tmp_path):
    plain = streamed(tmp_path)
    with pytest.raises(Refused, match=f"{4 * BYTES:,}"):
        ringed(plain, tmp_path, 4 * BYTES - 1)
    found, order = ringed(plain, tmp_path, 9 * 4 * BYTES)
    truth = walk(found, order, range(4))
    found._worker.pool.submit(lambda: None).result()
    found.close()
    told = []
    plain.say = told.append
    for shard in (tmp_path / "ring").rglob("*.safetensors"):
        data = bytearray(shard.read_bytes())
        data[-3] ^= 4
        shard.write_bytes(data)
    again, _ = ringed(plain, tmp_path, 9 * 4 * BYTES)
    assert all(map(torch.equal, walk(again, order, range(4)), truth))
    again.close()
    assert told and all("damaged" in one for one in told)


def test_what_stops_the_thread_stops_the_run(tmp_path, monkeypatch):
    plain = streamed(tmp_path)
    found, order = ringed(plain, tmp_path, 2 * 4 * BYTES)
    monkeypatch.setattr(
        "sfumato.data.store.shard.write", lambda *_: (_ for _ in ()).throw(Failed("no space"))
    )
    with pytest.raises(Failed, match="no space"):
        walk(found, order, range(40))
    found.close()
