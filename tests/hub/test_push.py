"""Publishing is one commit or nothing, and says which. The Hub is a stand-in on this machine that speaks its HTTP."""

import huggingface_hub.constants
import huggingface_hub.utils._http
import pytest

from dllm_hf import hub as package
from dllm_hf_cli import main

from ..builders import character_tokenizer, new_model
from .standin import lead_library_to, running_hub

NAME = "org/tiny"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the library's own requests


@pytest.fixture
def hub():
    with running_hub() as hub:
        yield hub


@pytest.fixture(autouse=True)
def library(hub, monkeypatch):
    lead_library_to(hub, monkeypatch)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    new_model("llada").save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def repository(source, tmp_path_factory):
    return package.export(str(source), tmp_path_factory.mktemp("out") / "tiny", name=NAME)


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_push_is_one_commit_that_holds_every_file(hub, repository):
    address = package.push(repository, NAME)
    assert hub.commits(NAME) == [content(repository)]
    assert address == f"{hub.url}/{NAME}/commit/{1:040x}"


def test_a_repository_is_public_unless_it_is_asked_to_be_private(hub, repository):
    package.push(repository, "org/open")
    package.push(repository, "org/closed", private=True)
    assert hub.repositories["org/open"]["visibility"] in (None, "public")
    assert hub.repositories["org/closed"]["visibility"] == "private"


def test_a_name_without_an_owner_is_the_users_own(hub, repository):
    assert "/me/tiny/commit/" in package.push(repository, "tiny")
    assert hub.commits("me/tiny") == [content(repository)]


def test_pushing_what_is_there_makes_no_second_commit(hub, repository):
    package.push(repository, NAME)
    package.push(repository, NAME)
    assert len(hub.commits(NAME)) == 1


def test_a_push_to_a_repository_that_exists_adds_one_commit(hub, repository, tmp_path):
    (tmp_path / "README.md").write_text("# Old\n")
    package.push(tmp_path, NAME)
    package.push(repository, NAME)
    assert len(hub.commits(NAME)) == 2 and hub.files(NAME) == content(repository)


FAILURES = [
    ("create", 401),
    ("create", 403),
    ("create", 500),
    ("create", "drop"),
    ("batch", 500),
    ("upload", 500),
    ("upload", "drop"),
    ("commit", 500),
    ("commit", 403),
    ("commit", "drop"),
]


@pytest.mark.parametrize("step, failure", FAILURES)
def test_a_failure_on_the_way_publishes_nothing_and_says_so_and_the_next_push_succeeds(hub, repository, step, failure):
    hub.fail[step] = failure
    with pytest.raises(OSError, match=f"{NAME}.* published.*push again") as failed:
        package.push(repository, NAME)
    if (step, failure) != ("commit", "drop"):  # nobody knows whether a commit was made that was not answered
        assert "was not published" in str(failed.value) and "nothing of this upload is visible" in str(failed.value)
    assert hub.commits(NAME) == []
    hub.fail.clear()
    package.push(repository, NAME)
    assert hub.commits(NAME) == [content(repository)]


def test_the_reason_of_a_failure_is_in_its_message(hub, repository, monkeypatch):
    hub.fail["create"] = 403
    with pytest.raises(OSError, match="403"):
        package.push(repository, NAME)


def test_without_a_token_nothing_is_published(hub, repository, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(OSError, match="was not published.*hf auth login"):
        package.push(repository, NAME)
    assert hub.repositories == {}


def test_with_nobody_listening_it_says_so(repository, monkeypatch):
    with running_hub() as gone:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", gone.url)
    with pytest.raises(OSError, match=f"{NAME} was not published: .*network"):
        package.push(repository, NAME)


def test_a_name_that_cannot_be_one_is_refused(hub, repository):
    with pytest.raises((OSError, ValueError), match="a/b/c"):
        package.push(repository, "a/b/c")
    assert hub.repositories == {}


def test_what_was_uploaded_before_a_failure_is_not_sent_twice(hub, repository):
    hub.fail["commit"] = 500
    with pytest.raises(OSError):
        package.push(repository, NAME)
    hub.fail.clear()
    package.push(repository, NAME)
    assert [method for method, _ in hub.requests].count("PUT") == 1


def test_a_commit_that_was_made_is_not_called_unpublished_when_its_answer_is_lost(hub, repository):
    hub.fail["commit"] = "lose the answer"
    try:
        package.push(repository, NAME)
    except OSError as error:
        assert "nothing of this upload is visible" not in str(error)
    assert hub.commits(NAME) == [content(repository)]


# `huggingface_hub` with hf_xet, which is how it is installed, uploads a folder in several commits when one does not work.
@pytest.mark.parametrize("xet", [False, True])
def test_a_commit_that_is_refused_is_not_tried_in_parts(hub, repository, xet, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", not xet)
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"{number}")
    hub.most = 20
    with pytest.raises(OSError, match="was not published"):
        package.push(tmp_path, NAME)
    assert hub.commits(NAME) == []


def test_many_files_are_one_commit_with_xet_as_well(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    for number in range(300):
        (tmp_path / f"{number}.txt").write_text(f"{number}")
    package.push(tmp_path, NAME)
    assert len(hub.commits(NAME)) == 1 and len(hub.files(NAME)) == 300


# Models


def test_a_model_is_pushed_with_the_code_it_needs(hub, repository):
    new_model("llada").push_to_hub(NAME, tokenizer=character_tokenizer())
    assert len(hub.commits(NAME)) == 1
    assert sorted(hub.files(NAME)) == sorted(content(repository))
    same = {name for name, text in hub.files(NAME).items() if text == content(repository)[name]}
    assert {name for name in hub.files(NAME) if name.endswith((".py", ".safetensors"))} <= same
    assert f'name = "{NAME}"' in hub.files(NAME)["README.md"].decode()


@pytest.mark.parametrize("family", ["dream", "sdar", "sdar_moe", "gla_dream"])
def test_so_is_one_of_any_other_family(hub, family):
    new_model(family).push_to_hub(NAME)
    assert len(hub.commits(NAME)) == 1
    assert any(name.startswith("modeling_") for name in hub.files(NAME))
    assert b"auto_map" in hub.files(NAME)["config.json"]


def test_a_model_is_pushed_without_its_code_on_request(hub):
    new_model("llada").push_to_hub(NAME, include_code=False)
    assert not [name for name in hub.files(NAME) if name.endswith(".py")]
    assert b"auto_map" not in hub.files(NAME)["config.json"]


def test_a_model_is_pushed_in_shards_in_one_commit(hub):
    new_model("llada").push_to_hub(NAME, max_shard_size="20KB", commit_message="In pieces", private=True)
    assert len(hub.commits(NAME)) == 1
    assert len([name for name in hub.files(NAME) if name.endswith(".safetensors")]) > 1
    assert "model.safetensors.index.json" in hub.files(NAME)
    assert hub.repositories[NAME]["visibility"] == "private"


@pytest.mark.parametrize("step, failure", [("create", 401), ("upload", "drop"), ("commit", 500)])
def test_a_model_whose_push_fails_is_not_published_and_the_error_says_so(hub, step, failure):
    hub.fail[step] = failure
    with pytest.raises(OSError, match=f"{NAME} was not published"):
        new_model("llada").push_to_hub(NAME)
    assert hub.commits(NAME) == []


def test_saving_with_code_and_pushing_at_once_is_refused_with_the_way_to_do_it(hub, tmp_path):
    with pytest.raises(ValueError, match="push_to_hub"):
        new_model("llada").save_pretrained(tmp_path / "out", include_code=True, push_to_hub=True)
    assert not (tmp_path / "out").exists() and hub.requests == []


# The command


def test_the_command_writes_and_publishes(hub, source, tmp_path, capsys):
    assert main(["export", str(source), str(tmp_path / "out"), "--push", NAME, "--private"]) == 0
    published = f"Published: {hub.url}/{NAME}/commit/{1:040x}"
    assert capsys.readouterr().out.splitlines() == [f"Written: {tmp_path / 'out'}", published]
    assert hub.commits(NAME) == [content(tmp_path / "out")]
    assert hub.repositories[NAME]["visibility"] == "private"
    assert f'name = "{NAME}"' in hub.files(NAME)["README.md"].decode()


def test_the_command_ends_with_2_and_one_line_when_it_could_not_publish(hub, source, tmp_path, capsys):
    hub.fail["commit"] = 500
    assert main(["export", str(source), str(tmp_path / "out"), "--push", NAME]) == 2
    stdout, stderr = capsys.readouterr()
    last = stderr.splitlines()[-1]
    assert last.startswith(f"dllm-hf: error: {NAME} was not published") and "Traceback" not in stderr
    assert "Published" not in stdout and hub.commits(NAME) == []
    assert (tmp_path / "out" / "README.md").is_file()


def test_the_command_publishes_nothing_of_a_source_that_is_broken(hub, tmp_path, capsys):
    assert main(["export", str(tmp_path / "none"), str(tmp_path / "out"), "--push", NAME]) == 2
    assert hub.requests == []
