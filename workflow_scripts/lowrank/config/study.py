"""The root of the config: all sections by name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Union

from pydantic import ConfigDict, Field

from lowrank.config.base import Distinct, Name, Section, Seed, Text
from lowrank.config.messages import suggestion as suggestion
from lowrank.config.outputs import Figure, Table
from lowrank.config.presets import Calibration, Covariance, MethodSettings, Search, SensitivityStudy, Validation
from lowrank.config.sources import Corpus, Instructions, Model, TaskFile
from lowrank.config.suites import Suite
from lowrank.config.tuning import AnyTuning
from lowrank.methods import settings_classes

MethodPreset = Annotated[Union[tuple(settings_classes())], Field(discriminator="kind")]  # type: ignore[valid-type]  # noqa: UP007


class KeptCheckpoints(Section):
    """Which checkpoints stay after their last use: those of both lists. Of the others, only the manifests do."""

    methods: Distinct[Name] | None = Field(default=None, description="names of presets; null: all")
    ratios: Distinct[Annotated[int, Field(ge=0, le=90)]] | None = Field(default=None, description="null: all")

    def holds(self, method: str, ratio: int) -> bool:
        """Whether the checkpoints of a method at a ratio stay, as compressed and after post-training."""
        named = self.methods is None or method in self.methods
        return named and (self.ratios is None or ratio in self.ratios)


def _or_use(schema: dict[str, Any]) -> None:
    """For editors: sections that must be there may come from the file that `use` names."""
    sections = [key for key in schema["required"] if key != "run"]
    schema["required"] = ["run"]
    schema["anyOf"] = [{"required": ["use"]}, {"required": sections}]


class Study(Section):
    """A whole study: what `snakemake --configfile FILE` reads."""

    model_config = ConfigDict(json_schema_extra=_or_use)

    run: Name = Field(description="results go to results/<run>")
    use: Text | None = Field(
        default=None,
        exclude=True,
        description="a file of presets, beside this one or in the repository's `config`: `presets/default.yaml`. Of a "
        "name that both have, the entry of this file counts, whole; presets that nothing here leads to are left out",
    )
    cache: Text = Field(default="cache", description="folder of downloads, shared by all runs")
    smoke: bool = Field(default=False, description="a quick look, not a measurement: allows `limit`, and tables say so")
    seeds: Distinct[Seed] = Field(default=[0], min_length=1)
    keep_checkpoints: KeptCheckpoints = Field(default_factory=KeptCheckpoints)
    models: dict[Name, Model] = Field(min_length=1)
    corpora: dict[Name, Corpus] = Field(default_factory=dict)
    instructions: dict[Name, Instructions] = Field(default_factory=dict)
    tasks: dict[Name, TaskFile] = Field(default_factory=dict)
    calibration: dict[Name, Calibration] = Field(default_factory=dict)
    covariance: dict[Name, Covariance] = Field(default_factory=dict)
    validation: dict[Name, Validation] = Field(default_factory=dict)
    search: dict[Name, Search] = Field(default_factory=dict)
    sensitivity: dict[Name, SensitivityStudy] = Field(default_factory=dict)
    methods: dict[Name, MethodPreset] = Field(min_length=1)  # type: ignore[valid-type]
    tuning: dict[Name, AnyTuning] = Field(default_factory=dict)
    suites: dict[Name, Suite] = Field(min_length=1)
    tables: dict[Name, Table] = Field(default_factory=dict)
    figures: dict[Name, Figure] = Field(default_factory=dict)

    @property
    def cache_folder(self) -> Path:
        """Where downloads are kept; `~` is the home folder."""
        return Path(self.cache).expanduser()

    def method(self, name: str) -> MethodSettings:
        """The method preset of that name, typed."""
        settings: MethodSettings = self.methods[name]
        return settings
