"""`Recipe`: the settings of a dataset, all that it depends on besides the log; stored in its manifest."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from cai_graph.errors import ConfigError
from trainers.config import at_least
from trainers.rows import KINDS, Kind

__all__ = ["PersonalData", "Recipe"]

PersonalData = Literal["drop", "keep"]
"""How to treat rows with text that looks like personal data or a secret."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of a dataset; the same recipe and log give the same rows."""

    kind: Kind
    """The kind of data."""
    test_share: float = 0.05
    """Share of the prompts that go to `test`, in [0, 1)."""
    near_duplicates: float | None = 0.8
    """Prompts of at least this similarity (Jaccard of their character 5-grams, in (0, 1]) are put in the same
    split; None: near duplicates are not searched for."""
    per_cluster: int | None = None
    """Maximum rows of one cluster of near-duplicate prompts; None: no cap."""
    per_user: int | None = None
    """Maximum rows of one user (`metadata["user"]`); None: no cap."""
    per_tenant: int | None = None
    """Maximum rows of one tenant (`metadata["tenant"]`); None: no cap."""
    kept_per_revised: float | None = None
    """Maximum kept drafts for each other row; None: all. Only for `sft`."""
    held_out: tuple[str, ...] = ()
    """Paths of evaluation sets, whose prompts are excluded."""
    personal_data: PersonalData = "drop"
    """How to treat rows with text that looks like personal data or a secret."""
    tokenizer: str | None = None
    """Folder of a Hugging Face tokenizer with a chat template; None: rows of any length."""
    max_tokens: int | None = None
    """Maximum length of a row in tokens: its prompt and its longest answer."""
    constitutions: tuple[str, ...] = ()
    """Files of constitutions, beside the built-in ones, whose wording `critique-sft` may need."""
    without_users: tuple[str, ...] = ()
    """Users whose rows are removed, after every other decision."""
    without_tenants: tuple[str, ...] = ()
    """Tenants whose rows are removed, after every other decision."""

    @property
    def leaving(self) -> frozenset[tuple[str, str]]:
        """The users and tenants whose rows are removed, as (`user` or `tenant`, id)."""
        return frozenset(
            [("user", id) for id in self.without_users] + [("tenant", id) for id in self.without_tenants]
        )

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as stored in the manifest.

        It has only the number of the users and tenants whose rows are removed, not their ids: datasets are
        passed on, and these asked to be left out.
        """
        without = {name: len(getattr(self, name)) for name in ("without_users", "without_tenants")}
        return asdict(self) | without

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"kind is one of {', '.join(KINDS)}; found {self.kind!r}")
        if self.personal_data not in get_args(PersonalData):
            raise ConfigError(f"personal_data is 'drop' or 'keep', found {self.personal_data!r}")
        if not 0 <= self.test_share < 1:
            raise ConfigError(f"test_share is a share from 0 to below 1, found {self.test_share!r}")
        if self.near_duplicates is not None and not 0 < self.near_duplicates <= 1:
            raise ConfigError(
                f"near_duplicates is a similarity above 0 and up to 1, found {self.near_duplicates!r}"
            )
        at_least(1, self, "per_user", "per_tenant", "per_cluster", "max_tokens")
        if self.per_cluster is not None and self.near_duplicates is None:
            raise ConfigError("per_cluster caps clusters of near duplicates; set near_duplicates, too")
        if (self.tokenizer is None) != (self.max_tokens is None):
            raise ConfigError("tokenizer and max_tokens belong together; set both or neither")
        if self.kept_per_revised is not None:
            if self.kind != "sft":
                raise ConfigError("kept_per_revised mixes rows of the kind sft; leave it out for others")
            if self.kept_per_revised < 0:
                raise ConfigError(f"kept_per_revised is a ratio from 0, found {self.kept_per_revised!r}")
