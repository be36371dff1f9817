"""Findings: what diagnosis says of runs, how far it has come, and which collector does it."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Creates their tables, empty."""
    op.create_table(
        "finding",
        sa.Column("id", _ID, nullable=False),
        sa.Column("run_id", _ID, nullable=False),
        sa.Column("rule", sa.Text, nullable=False),
        sa.Column("slot", sa.Integer, nullable=False, comment="slot.slot; -1: the whole run"),
        sa.Column("severity", sa.Text, nullable=False, comment="info | warning | critical: the episode's worst"),
        sa.Column("ranks_json", sa.Text, nullable=False, comment="JSON array of the ranks that have it"),
        sa.Column("first_step", sa.BigInteger, nullable=False),
        sa.Column("last_step", sa.BigInteger, nullable=False),
        sa.Column("first_row", sa.BigInteger, nullable=False, comment="recorded steps of the run before first_step"),
        sa.Column("last_row", sa.BigInteger, nullable=False, comment="recorded steps of the run before last_step"),
        sa.Column("rows", sa.BigInteger, nullable=False, comment="recorded steps, of each rank, that were marked"),
        sa.Column("worst", sa.Double, nullable=True, comment="how bad it was, in a unit of the rule's own"),
        sa.Column("worst_step", sa.BigInteger, nullable=False),
        sa.Column("numbers_json", sa.Text, nullable=False, comment="JSON object: evidence at worst_step"),
        sa.Column("note", sa.Text, nullable=False, comment="what the rule says of worst_step, in words"),
        sa.Column("says", sa.Text, nullable=False, comment="what is wrong, in words"),
        sa.Column("evidence", sa.Text, nullable=False, comment="what was seen, in numbers"),
        sa.Column("cause", sa.Text, nullable=False, comment="what usually causes it"),
        sa.Column("remedy", sa.Text, nullable=False, comment="what to do, in words"),
        sa.Column("change", sa.Text, nullable=False, comment="the same as Python or a setting; empty: there is none"),
        sa.Column("opened_unix_ns", sa.BigInteger, nullable=False, comment="collector's clock"),
        sa.Column("updated_unix_ns", sa.BigInteger, nullable=False),
        sa.Column("closed_unix_ns", sa.BigInteger, nullable=True, comment="null: open"),
        sa.Column("ending", sa.Text, nullable=True, comment="cleared | ended | rewritten; null: open"),
        sa.Column("acknowledged_unix_ns", sa.BigInteger, nullable=True, comment="null: nobody has"),
        sa.Column("acknowledged_by", sa.Text, nullable=True),
        sa.Column("acknowledged_reason", sa.Text, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_finding"),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name="fk_finding_run_id_run", ondelete="CASCADE"),
        sa.UniqueConstraint("run_id", "rule", "slot", "first_step", name="uq_finding_run_id_rule_slot_first_step"),
    )
    op.create_table(
        "judged",
        sa.Column("run_id", _ID, nullable=False),
        sa.Column("step", sa.BigInteger, nullable=False, comment="steps up to this one are judged; -1: none"),
        sa.Column("rows", sa.BigInteger, nullable=False, comment="recorded steps judged"),
        sa.Column(
            "sources_json", sa.Text, nullable=False, comment="JSON object: source.id to the last step of it judged"
        ),
        sa.Column("updated_unix_ns", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("run_id", name="pk_judged"),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name="fk_judged_run_id_run", ondelete="CASCADE"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "lease",
        sa.Column("task", sa.Text, nullable=False, comment="diagnosis"),
        sa.Column("holder", sa.Text, nullable=False, comment="the process that does it"),
        sa.Column("until_unix_ns", sa.BigInteger, nullable=False, comment="from then on another may take it"),
        sa.PrimaryKeyConstraint("task", name="pk_lease"),
        sqlite_with_rowid=False,
    )
