"""Files that are no checkpoint, or not as they were written, are refused by name."""

import dataclasses

import pytest
import torch

from sinkbed.data.files import write_json
from sinkbed.train.run.checkpoint import load_checkpoint
from sinkbed.train.run.sharded import load_sharded
from tests.support.runs import refused, seal


@pytest.mark.parametrize("content", [[1, 2], {"sinkbed": {}}, {"state_dict": [], "global_step": "x"}, "text"])
def test_a_file_that_is_no_checkpoint_is_refused_by_name(fit, capsys, tmp_path, content):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(content, folder / "step-0000003.ckpt")
    message = refused(capsys, fit("--ckpt_path", "last")[0])
    assert "step-0000003.ckpt: expected a checkpoint" in message and "Traceback" not in message


def test_a_sharded_checkpoint_is_under_checksums_as_a_whole(sharded):
    assert load_checkpoint(sharded)["state_dict"]["w"].tolist() == list(range(8))
    sums = seal(sharded)
    for missing in sums:
        write_json(sharded / "checksums.json", {k: v for k, v in sums.items() if k != missing})
        with pytest.raises(ValueError, match=f"checksum of {missing}"):
            load_checkpoint(sharded)
    write_json(sharded / "checksums.json", {})
    with pytest.raises(ValueError, match="checksum of"):
        load_checkpoint(sharded)


@pytest.mark.parametrize("chunks", ["none", "a part", "the same twice"])
def test_an_index_that_lacks_a_part_of_a_tensor_is_refused(sharded, chunks):
    import pickle

    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    with (sharded / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    entry = metadata.state_dict_metadata["model|w"]
    half = ChunkStorageMetadata(offsets=torch.Size([0]), sizes=torch.Size([4]))
    entry.chunks = {"none": [], "a part": [half], "the same twice": [half, dataclasses.replace(half)]}[chunks]
    with (sharded / ".metadata").open("wb") as file:
        pickle.dump(metadata, file)
    seal(sharded)
    with pytest.raises(ValueError, match=r"not all of model\|w"):
        load_sharded(sharded)
