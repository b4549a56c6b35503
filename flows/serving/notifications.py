"""Automations that notify a person: of a run that failed or died, a version that was blocked, a schedule that is stuck.

They use the block named `deepfloyd` of the server: a webhook, or any of Prefect's notification blocks (e-mail, Slack,
Teams ...), which a person creates once, in the UI or with `prefect block`. `deepfloyd ui` creates each automation when the
block is there and the automation is not. So one that the user changes or pauses stays so; one that is deleted comes back,
unless the block is deleted too.
"""

from dataclasses import dataclass
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import BlockDocument
from prefect.events.actions import CallWebhook, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger
from prefect.events.schemas.events import ResourceSpecification

BLOCK = "deepfloyd"
_RUN = "{{ flow.name }} run {{ flow_run.name }}"


@dataclass(frozen=True)
class Rule:
    """What is told, in templates of Prefect's."""

    name: str
    events: frozenset[str]
    resource: str  # whose events count
    subject: str
    body: str


RULES = (
    Rule(
        "deepfloyd: run failed",
        frozenset({"prefect.flow-run.Failed", "prefect.flow-run.Crashed"}),
        "prefect.flow-run.*",
        _RUN + ": {{ flow_run.state.name }}",
        "{{ flow_run.state.message }} {{ flow_run|ui_url }}",
    ),
    Rule(
        "deepfloyd: version blocked",
        frozenset({"deepfloyd.version.blocked"}),
        "deepfloyd.workspace.*",
        "{{ event.resource.name }}: version {{ event.payload.version }} is blocked",
        "{{ event.payload.message }}",
    ),
    Rule(
        "deepfloyd: schedule stuck",
        frozenset({"deepfloyd.schedule.stuck"}),
        "deepfloyd.schedule.*",
        "{{ event.resource.name }} is stuck",
        "{{ event.payload.message }}",
    ),
)


def keep_notifications(client: SyncPrefectClient) -> list[str]:
    """Create the automations that are missing, where the block is there, and let those use it that had an earlier block.

    Returns a line for each.
    """
    blocks = client.read_block_documents(include_secrets=False)
    block = next((one for one in blocks if one.name == BLOCK), None)
    if block is None:
        return []
    there = {one.name: one for one in client.read_automations()}
    told = []
    for rule in RULES:
        old = there.get(rule.name)
        if old is None:
            client.create_automation(_automation(rule, block))
        elif _blocks_of(old) <= {one.id for one in blocks}:
            continue
        else:
            client.update_automation(old.id, _automation(rule, block).model_copy(update={"enabled": old.enabled}))
        told.append(f"the automation {rule.name!r} uses the block {BLOCK!r} from now on")
    return told


def _blocks_of(automation: AutomationCore) -> set[UUID]:
    return {one.block_document_id for one in automation.actions if isinstance(one, CallWebhook | SendNotification)}


def _automation(rule: Rule, block: BlockDocument) -> AutomationCore:
    trigger = EventTrigger(
        expect=set(rule.events), match=ResourceSpecification({"prefect.resource.id": rule.resource}), threshold=1
    )
    return AutomationCore(
        name=rule.name,
        description=f"Notifies by the block {BLOCK!r}.",
        trigger=trigger,
        actions=[_action(rule, block.id, is_webhook=_slug(block) == "webhook")],
    )


def _action(rule: Rule, block: UUID, *, is_webhook: bool) -> CallWebhook | SendNotification:
    if not is_webhook:
        return SendNotification(block_document_id=block, subject=rule.subject, body=rule.body)
    subject, body = (f"{{% set text %}}{text}{{% endset %}}{{{{ text|tojson }}}}" for text in (rule.subject, rule.body))
    # `text` is what Slack, Teams and Mattermost show.
    return CallWebhook(block_document_id=block, payload=f'{{"text": {subject}, "details": {body}}}')


def _slug(block: BlockDocument) -> str:
    return block.block_type.slug if block.block_type else ""
