"""A repository that was exported, or saved with its code, runs where dllm_hf cannot be imported, and gives the same."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from dllm_hf import (
    DreamModel,
    Fast_dLLM_QwenForCausalLM,
    Fast_dLLM_QwenModel,
    GLADreamModel,
    LLaDA2MoeModel,
    LLaDA2MoeModelLM,
    LLaDAModelLM,
    LLaDAMoEModelLM,
    NemotronLabsDiffusionModel,
    SDARForCausalLM,
    SDARModel,
    SDARMoeForCausalLM,
    SDARMoeModel,
)
from dllm_hf.generation.custom_generate import generate
from dllm_hf.hub import export, export_loop

from ..builders import BUILDERS, END, character_tokenizer, is_sampled, left_pad, new_model
from .conftest import LOOP_OPTIONS, LOOP_ROWS, Fresh, content, in_hub_cache, masked_bert, weights

HERE = Path(__file__).parents[2]
GOLDEN = sorted(path.parent for path in (HERE / "tests" / "golden").glob("*/cases.json"))
SHAKESPEARE = HERE / "hub_configs" / "llada-tiny-shakespeare"
PROMPT = "to be"
IDS = character_tokenizer()(PROMPT)["input_ids"]
# Nothing is drawn, and nothing ends early.
FIRM = {"max_new_tokens": 12, "remasking_strategy": "low_confidence_static", "suppress_tokens": [END], "temperature": 0}
DRAWN = {**FIRM, "temperature": 0.9}
SEED = 11
# Families whose configurations alone are exported: the same code does that for all.
CONFIG_ONLY = ("llada", "sdar_moe", "gla_dream")
# What `AutoModel` gives, and what `AutoModelForCausalLM` gives.
CLASSES = {
    "llada": (LLaDAModelLM, LLaDAModelLM),
    "dream": (DreamModel, DreamModel),
    "sdar": (SDARModel, SDARForCausalLM),
    "sdar_moe": (SDARMoeModel, SDARMoeForCausalLM),
    "llada2": (LLaDA2MoeModel, LLaDA2MoeModelLM),
    "llada_moe": (LLaDAMoEModelLM, LLaDAMoEModelLM),
    "gla_dream": (GLADreamModel, GLADreamModel),
    "nemotron_diffusion": (NemotronLabsDiffusionModel, NemotronLabsDiffusionModel),
    "fast_dllm_v2": (Fast_dLLM_QwenModel, Fast_dLLM_QwenForCausalLM),
}
COMMON = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}


def drawn(model) -> list[int]:
    return model.diffusion_generate(
        torch.tensor([IDS]), generator=torch.Generator().manual_seed(SEED), **DRAWN
    ).tolist()[0]


@dataclass
class Made:
    """A family's source, what was made of it, and what a fresh process said about each of these."""

    family: str
    source: Path
    before: dict[str, bytes]
    model: object
    fresh: Fresh
    places: dict[str, str] = field(default_factory=dict)  # kind -> what `from_pretrained` is given
    folders: dict[str, Path] = field(default_factory=dict)

    def answer(self, kind, task):
        return self.fresh.answer((self.family, kind, task))

    def again(self, kind) -> Path:
        """Where the fresh process saves what it loaded."""
        return self.source.parent / f"{kind}-{self.family}-again"


# The kinds of repository that are tried: an export in a folder and in the hub's cache, and what was saved with its code.
KINDS = ("exported", "cached", "saved")
# What a process without dllm_hf tries: each family's export in a folder, and of the other two, which have the same files, one
# each, of families that bring a tokenizer. What it saved is loaded again of few, since it has the same files too.
TRIED = [*((family, "exported") for family in BUILDERS), ("dream", "cached"), ("gla_dream", "saved")]
TRIED_AGAIN = [(family, "exported") for family in BUILDERS if not is_sampled(family)]
each_repository = pytest.mark.parametrize("made, kind", TRIED, indirect=True)
each_that_is_loaded_again = pytest.mark.parametrize("made, kind", TRIED_AGAIN, indirect=True)


def make(family: str, top: Path, fresh: Fresh) -> Made:
    """A family's source and repositories, and what the fresh process is to say about each."""
    source = top / "source"
    model = new_model(family)
    model.save_pretrained(source)
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(source)
    made = Made(family, source, content(source), model, fresh)

    name = f"org/some.{family}-v1.5"
    made.folders["exported"] = export(str(source), top / f"exported-{family}-v1.5")
    made.folders["cached"] = in_hub_cache(export(str(source), top / "to-push", name=name), top.parent / "hub", name)
    made.folders["saved"] = top / f"saved-{family}"
    tokenizer.save_pretrained(made.folders["saved"])
    model.save_pretrained(made.folders["saved"], include_code=True)
    made.places = {kind: str(folder) for kind, folder in made.folders.items()} | {"cached": name}

    for kind in (kind for tried, kind in TRIED if tried == family):
        place = made.places[kind]
        ask = lambda key, task, kind=kind, **arguments: fresh.ask((family, kind, key), task, **arguments)
        ask("classes", "classes", name=place)
        ask("tokenizer", "tokenizer", name=place, text=PROMPT)
        ask("firm", "tokens", name=place, ids=IDS, options=FIRM)
        ask("drawn", "tokens", name=place, ids=IDS, options=DRAWN, seed=SEED)
        ask("hidden", "hidden", name=place, ids=IDS)
        ask("text", "text", name=place, prompt=PROMPT, options=FIRM)
        ask("card", "card", name=place, folder=made.folders[kind])
        again = made.again(kind)
        ask("saved again", "saved_again", name=place, folder=again)
        if (family, kind) not in TRIED_AGAIN:
            continue
        ask("again classes", "classes", name=again)
        ask("again tokenizer", "tokenizer", name=again, text=PROMPT)
        ask("again firm", "tokens", name=again, ids=IDS, options=FIRM)
        ask("again text", "text", name=again, prompt=PROMPT, options=FIRM)
    return made


@pytest.fixture(scope="module")
def tried(tmp_path_factory, fresh_processes) -> tuple[dict[str, Made], dict[str, Path], Fresh]:
    """What was made of each family, exports of other sources by name, and the one fresh process that tried all of them: to
    import the libraries takes it longer than a family."""
    top, fresh = tmp_path_factory.mktemp("made"), fresh_processes()
    made = {family: make(family, top / family, fresh) for family in BUILDERS}
    folders = export_others(top, fresh)
    return made, folders, fresh.run(HF_HUB_CACHE=top / "hub")


@pytest.fixture(params=BUILDERS)
def made(request, tried) -> Made:
    return tried[0][request.param]


@pytest.fixture
def kind(request) -> str:
    return request.param


def expected_classes(made, place: str) -> dict:
    """The classes by the names they have here, in modules that come from that repository."""
    config = type(made.model.config)
    by_auto = dict(zip(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), (config, *CLASSES[made.family])))
    return {auto: (Path(place).name, cls.__module__.split(".")[-1], cls.__name__) for auto, cls in by_auto.items()}


def place_and_class(module: str, name: str) -> tuple[str, str, str]:
    """`transformers_modules.org.NAME.hash.modeling_x` or, of a folder, `transformers_modules.NAME.hash.modeling_x`."""
    library, *_, place, _, file = module.split(".")
    assert library == "transformers_modules"
    return place.replace("_dot_", ".").replace("_hyphen_", "-"), file, name


# In a process that cannot import dllm_hf


@each_repository
def test_the_auto_classes_find_the_repositorys_own(made, kind):
    found = {auto: place_and_class(*where) for auto, where in made.answer(kind, "classes").items()}
    assert found == expected_classes(made, made.places[kind])


@each_repository
def test_the_tokenizer_is_the_sources(made, kind):
    answer = made.answer(kind, "tokenizer")
    assert answer["ids"] == IDS
    assert (answer["mask_token"], answer["eos_token"], answer["padding_side"]) == ("<mask>", "<end>", "left")


def test_the_familys_own_tokenizer_is_used(made):
    own = {"dream": "DreamTokenizer", "gla_dream": "GLADreamTokenizer"}
    if made.family in own:
        assert made.answer("exported", "tokenizer")["class"] == own[made.family]


@each_repository
def test_diffusion_generate_gives_the_same_tokens(made, kind):
    expected = made.model.diffusion_generate(torch.tensor([IDS]), **FIRM).tolist()[0]
    assert made.answer(kind, "firm") == expected and len(expected) == len(IDS) + 12


@each_repository
def test_it_gives_the_same_drawn_tokens_with_the_same_seed(made, kind):
    assert made.answer(kind, "drawn") == drawn(made.model)


@each_repository
def test_the_pipeline_writes_the_same_text(made, kind):
    here = pipeline("text-generation", model=made.model, tokenizer=character_tokenizer())
    expected = here(PROMPT, **FIRM)[0]["generated_text"]
    assert made.answer(kind, "text") == expected and expected.startswith(PROMPT) and len(expected) > len(PROMPT)


@each_repository
def test_auto_model_runs(made, kind):
    stack, causal_lm = CLASSES[made.family]
    width = made.model.config.vocab_size if stack is causal_lm else made.model.config.hidden_size
    assert made.answer(kind, "hidden") == [1, len(IDS), width]


@each_repository
def test_the_usage_code_of_the_card_runs_as_it_is_written(made, kind):
    assert made.answer(kind, "card").startswith("Once upon a time")


@each_repository
def test_what_is_saved_there_has_the_same_files_and_the_same_code(made, kind):
    expected = content(made.folders[kind])
    assert {*made.answer(kind, "saved again")} == {*expected} - {"README.md"}
    for name, data in content(made.again(kind)).items():
        assert not name.endswith(".py") or data == expected[name], name


@each_that_is_loaded_again
def test_what_is_saved_there_loads_by_its_own_code(made, kind):
    found = {auto: place_and_class(*where) for auto, where in made.answer(kind, "again classes").items()}
    assert found == expected_classes(made, made.again(kind).name)


@each_that_is_loaded_again
def test_what_is_saved_there_gives_the_same_again(made, kind):
    assert made.answer(kind, "again firm") == made.answer(kind, "firm")
    assert made.answer(kind, "again text") == made.answer(kind, "text")
    assert made.answer(kind, "again tokenizer") == made.answer(kind, "tokenizer")


# What is in it


def test_an_export_holds_the_models_files_its_code_and_a_card_and_nothing_else(made):
    there = {*content(made.folders["exported"])}
    code = {name for name in there if name.endswith(".py")}
    assert there - code == COMMON | TOKENIZER
    assert code == {name for name in content(made.folders["saved"]) if name.endswith(".py")}
    assert not [path for path in made.folders["exported"].iterdir() if path.is_dir()]


def test_the_weights_are_those_of_the_source_byte_by_byte(made):
    assert weights(made.folders["exported"]) == weights(made.source)


def test_the_source_stays_as_it_was(made):
    assert content(made.source) == made.before


def test_only_what_says_where_the_code_is_changes_in_the_configurations(made):
    source, exported = (json.loads((f / "config.json").read_text()) for f in (made.source, made.folders["exported"]))
    assert exported.pop("auto_map").keys() == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} | (
        {"AutoTokenizer"} if made.family in ("dream", "gla_dream") else set()
    )
    assert exported == source
    for name in ("generation_config.json", "tokenizer.json"):
        assert content(made.folders["exported"])[name] == made.before[name]
    settings = json.loads(content(made.folders["exported"])["tokenizer_config.json"])
    settings.pop("auto_map", None)
    assert settings == json.loads(made.before["tokenizer_config.json"])


def test_saving_the_model_with_its_code_gives_what_an_export_gives(made):
    saved, exported = content(made.folders["saved"]), content(made.folders["exported"])
    assert saved.keys() == exported.keys()
    assert {name for name in saved if saved[name] != exported[name]} <= {
        "README.md",
        "config.json",
        "tokenizer_config.json",
    }
    assert json.loads(saved["config.json"])["auto_map"] == json.loads(exported["config.json"])["auto_map"]


def test_it_loads_here_as_well_with_the_classes_of_this_package(made):
    model = AutoModelForCausalLM.from_pretrained(made.folders["exported"])
    assert type(model) is CLASSES[made.family][1]
    assert model.diffusion_generate(torch.tensor([IDS]), **FIRM).tolist()[0] == made.answer("exported", "firm")


def test_the_header_of_the_card_tells_the_hub_what_it_is(made):
    for kind in KINDS:
        data = ModelCard.load(made.folders[kind] / "README.md").data
        assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "unknown")
        assert {"dllm-hf", "diffusion", "custom_code", made.model.config.model_type.lower().replace("_", "-")} <= {
            *data.tags
        }
        assert data.base_model is None


# Sources of other kinds. They are exported to folders of one name.


def export_others(top: Path, fresh: Fresh) -> dict[str, Path]:
    """Exports by name: the originals' tiny checkpoints, ours of the docs, shards, configurations alone, and the loop alone."""
    folders = {}
    for source in [*GOLDEN, SHAKESPEARE]:
        folders[source.name] = folder = export(str(source), top / source.name / "out")
        fresh.ask((source.name, "firm"), "tokens", name=folder, ids=[5, 6, 7], options=FIRM)
    fresh.ask("card", "card", name="", folder=folders[SHAKESPEARE.name])
    fresh.ask("text", "text", name=folders[SHAKESPEARE.name], prompt="ROMEO:", options=FIRM)

    sharded = top / "sharded"
    new_model("sdar").save_pretrained(sharded, max_shard_size="20KB")
    folders["sharded"] = export(str(sharded), top / "of-shards")
    fresh.ask(("sharded", "firm"), "tokens", name=folders["sharded"], ids=IDS, options=FIRM)
    for family in CONFIG_ONLY:
        source = top / f"config-{family}"
        new_model(family).save_pretrained(source)
        character_tokenizer().save_pretrained(source)
        folders[f"config-{family}"] = export(str(source), top / "config-only" / family, config_only=True)
        fresh.ask(("config", family), "from_config", name=folders[f"config-{family}"])

    masked_bert().save_pretrained(top / "bert")
    loop = export_loop(top / "loop")
    fresh.ask("loop", "loop", name=top / "bert", code=loop, rows=LOOP_ROWS, options=LOOP_OPTIONS)
    return folders


@pytest.mark.parametrize("source", [*GOLDEN, SHAKESPEARE], ids=lambda source: source.name)
def test_an_originals_files_give_what_they_give_here(tried, source):
    _, folders, fresh = tried
    expected = AutoModelForCausalLM.from_pretrained(source).diffusion_generate(torch.tensor([[5, 6, 7]]), **FIRM)
    assert fresh.answer((source.name, "firm")) == expected.tolist()[0]
    assert weights(folders[source.name]) == {"model.safetensors": (source / "model.safetensors").read_bytes()}


@pytest.mark.parametrize("source", GOLDEN, ids=lambda source: source.name)
def test_nothing_else_of_an_originals_folder_is_taken(tried, source):
    there = {name for name in content(tried[1][source.name]) if not name.endswith(".py")}
    assert there == COMMON - {"generation_config.json"}


def test_the_small_model_of_the_documentation_writes_after_its_export(tried):
    *_, fresh = tried
    assert fresh.answer("card").startswith("Once upon a time")
    here = AutoModelForCausalLM.from_pretrained(SHAKESPEARE)
    write = pipeline("text-generation", model=here, tokenizer=AutoTokenizer.from_pretrained(SHAKESPEARE))
    assert fresh.answer("text") == write("ROMEO:", **FIRM)[0]["generated_text"]


def test_shards_and_their_index_are_taken_as_they_are(tried):
    _, folders, fresh = tried
    source = folders["sharded"].parent / "sharded"
    assert len(weights(source)) > 1 and weights(folders["sharded"]) == weights(source)
    index = "model.safetensors.index.json"
    assert content(folders["sharded"])[index] == content(source)[index]
    expected = new_model("sdar").diffusion_generate(torch.tensor([IDS]), **FIRM).tolist()[0]
    assert fresh.answer(("sharded", "firm")) == expected


@pytest.mark.parametrize("family", CONFIG_ONLY)
def test_a_configuration_alone_builds_the_model(tried, family):
    _, folders, fresh = tried
    there = {name for name in content(folders[f"config-{family}"]) if not name.endswith(".py")}
    assert there == COMMON - {"model.safetensors"}
    module, name = fresh.answer(("config", family))
    assert module.startswith("transformers_modules.") and name == CLASSES[family][1].__name__


def test_the_loop_alone_gives_what_it_gives_here(tried):
    assert tried[2].answer("loop") == generate(masked_bert(), **left_pad(LOOP_ROWS, pad=0), **LOOP_OPTIONS).tolist()
