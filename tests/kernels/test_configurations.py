"""Launch configurations in files: per chip, and per name of a measured device."""

import logging
import shutil

import pytest
import torch

from grasp_kernels._triton import launch

DELTA = launch.Config({"BLOCK_M": 32}, 8, 2)


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """gpu("NAME", 9, 0) is such a device; its configurations are in a copy of the folder."""
    shutil.copytree(launch.CONFIGS, tmp_path / "configs")
    monkeypatch.setattr(launch, "CONFIGS", tmp_path / "configs")
    launch.table.cache_clear()

    def gpu(name, *capability):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        return torch.device("cuda", 0)

    yield gpu
    launch.table.cache_clear()


def test_every_chip_has_every_kernel():
    tables = [launch.of_chip(chip) for chip in launch.chips()]
    assert launch.chips() == [80, 86, 90, 100, 120]
    assert all(table.keys() == tables[0].keys() for table in tables)


@pytest.mark.parametrize(("chip", "like"), [(80, 80), (87, 86), (89, 86), (103, 100), (121, 120)])
def test_an_unknown_chip_takes_the_nearest_older_one(chip, like):
    assert launch.of_chip(chip) == launch.of_chip(like)


def test_a_device_that_was_measured_takes_what_was_found(gpu):
    device = gpu("NVIDIA H000 80GB", 9, 0)
    launch.write({"attention_delta": DELTA}, launch.CONFIGS / "nvidia-h000-80gb.json")
    assert launch.config("attention_delta", device) == DELTA
    other = ("attention_forward", 16, 128)
    assert launch.config(other, device) == launch.of_chip(90)[other]
    launch.table.cache_clear()
    unmeasured = gpu("NVIDIA H001", 9, 0)  # no file that is installed can have this name
    assert launch.table(unmeasured) == launch.of_chip(90)


def test_one_that_was_not_says_so_once(gpu, caplog):
    device = gpu("NVIDIA L4", 8, 9)
    with caplog.at_level(logging.DEBUG):
        for _ in range(2):
            assert launch.config("attention_delta", device) == launch.of_chip(86)["attention_delta"]
    (record,) = caplog.records
    assert record.levelname == "DEBUG"
    assert "NVIDIA L4" in record.message and "sm_86" in record.message


def test_an_old_gpu_is_refused(gpu):
    with pytest.raises(RuntimeError, match=r"Tesla T4 has compute capability 7.5, expected 8.0"):
        launch.table(gpu("Tesla T4", 7, 5))


def test_what_is_written_is_read(tmp_path):
    table = launch.of_chip(90)
    launch.write(table, tmp_path / "sm_90.json")
    assert launch.read(tmp_path / "sm_90.json") == table
