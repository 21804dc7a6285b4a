"""What a request may ask for: its JSON as classes, from which FastAPI writes the OpenAPI document, and its limits."""

import re
import secrets
from typing import Annotated, Any, Dict, List, Mapping, NamedTuple, Optional

import torch
from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from generation.images import ImageSpec, plan_image
from generation.loading import LoadedModel
from models.sampling import Sampling

SEEDS = 2**63
Number = Annotated[Optional[float], Field(allow_inf_nan=False)]


class Limits(NamedTuple):
    """What one request may ask for; `images` per prompt."""

    images: int
    prompt_characters: int
    prompts: int = 8


class Settings(BaseModel):
    """The keys that both kinds of request share; null is the same as leaving a key out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    seed: Optional[int] = Field(None, ge=0, lt=SEEDS, description="of each prompt's first image; the next is 1 more")
    top_k: Number = Field(None, description="up to 1: share of the codes that is never sampled; above: codes to keep")
    top_p: Number = Field(None, description="sample from the most likely codes up to this sum of probabilities")
    temperature: Number = Field(None, description="below 1 is safer, above 1 wilder")
    cond_scale: Number = Field(None, description="guidance by the prompt; 1 is none")
    num_images: Optional[int] = Field(
        1, ge=1, validation_alias=AliasChoices("num_images", "count"), description="images to generate per prompt"
    )
    image: Optional[str] = Field(None, description="an image in base64, whose upper rows are kept")
    keep_rows: Number = Field(
        None,
        validation_alias=AliasChoices("keep_rows", "keep"),
        description="rows of codes of `image` to keep, or a share below 1; 0.5 by default",
    )


class GenerateRequest(Settings):
    """What POST /api/generate accepts."""

    prompt: str = Field(description="what the images should show")


class JobRequest(Settings):
    """What POST /api/jobs accepts."""

    prompts: List[str] = Field(min_length=1, description="what the images should show")


class Error(BaseModel):
    """Every answer that is not a success."""

    error: str = Field(description="one sentence")


class Image(BaseModel):
    """A finished image."""

    png: str = Field(description="base64; carries its metadata as text chunks")
    seed: int
    metadata: Dict


class Generated(BaseModel):
    """The answer of POST /api/generate."""

    images: List[Image]
    seconds: float


class JobCreated(BaseModel):
    """The answer of POST /api/jobs."""

    id: str
    images: int


class Prompt(BaseModel):
    """How the model reads a prompt."""

    tokens: int
    unknown_words: List[str] = Field(description="words that no training caption has")


class ModelInfo(BaseModel):
    """What the page needs to know of the model and the limits."""

    model_config = ConfigDict(protected_namespaces=())

    name: str
    fingerprint: str
    image_size: int
    rows: int = Field(description="rows of codes of an image")
    max_images: int = Field(description="per prompt")
    max_prompts: int
    max_prompt_characters: int
    max_upload_bytes: int
    text_seq_len: int
    guidable: bool = Field(description="whether cond_scale may differ from 1")
    recommended: Dict[str, Optional[float]]
    examples: List[str]
    known_words: int = Field(description="0 if the checkpoint does not say")
    prompt: Optional[Prompt] = None


class Health(BaseModel):
    """The answer of GET /health."""

    status: str
    checkpoint: str
    waiting: int
    images_generated: int
    seconds_up: int


def plan_request(
    loaded: LoadedModel, limits: Limits, wanted: Settings, prompts: List[str], given: Optional[torch.Tensor] = None
) -> List[ImageSpec]:
    """Return the ImageSpecs of a request, with seeds from the wanted or a random one on; ValueError if out of range."""
    if len(prompts) > limits.prompts:
        raise ValueError(f"There are {len(prompts)} prompts; at most {limits.prompts} are accepted.")
    count, seed = wanted.num_images or 1, wanted.seed
    if count > limits.images:
        raise ValueError(f"{count} images are asked for; from 1 to {limits.images} can be generated at once.")
    seed = secrets.randbelow(2**31) if seed is None else seed
    if seed >= SEEDS - limits.images:
        raise ValueError(f"The seed is {seed}; it must be a whole number from 0 to {SEEDS - limits.images - 1}.")
    if not loaded.guidable and wanted.cond_scale not in (None, 1):
        raise ValueError("This model was trained without caption dropout and cannot be guided; leave cond_scale at 1.")
    sampling = {name: getattr(wanted, name) for name in Sampling._fields}
    specs: List[ImageSpec] = []
    for place, prompt in enumerate(prompts, 1):
        which = f"Prompt {place}" if len(prompts) > 1 else "The prompt"
        if len(prompt) > limits.prompt_characters:
            most = limits.prompt_characters
            raise ValueError(f"{which} has {len(prompt)} characters; at most {most} are accepted.")
        prompt = " ".join(prompt.split())
        if not prompt:
            raise ValueError(f"{which} is empty; write what the image should show.")
        specs += plan_image(loaded, prompt, seed, sampling, given).with_seeds(count)
    return specs


def as_sentence(error: Exception) -> str:
    """Return an error's message with a capital, unless it begins with the name of a setting, and a full stop."""
    text = " ".join(str(error).split())
    begin = text[:1].upper() if re.match(r"[a-z]+[ ,]", text) else text[:1]
    return begin + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def describe_invalid(error: Mapping[str, Any]) -> str:
    """Return one of pydantic's errors as a sentence."""
    if error["type"] == "json_invalid":
        return "The request's body is not JSON."
    places = [part for part in error["loc"] if part not in ("body", "query", "path", "header")]
    key = str(places[0])[:40].encode("ascii", "backslashreplace").decode() if places else "The request's body"
    return f"{key}: {error['msg'][:1].lower()}{error['msg'][1:]}."
