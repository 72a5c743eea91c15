"""A comparison of two models in some lines for a person."""

from collections.abc import Mapping
from typing import Any

__all__ = ["conclusions_table", "summary_of"]

SHOWN = 8


def summary_of(figures: Mapping[str, Any]) -> str:
    """The figures of a report as text."""
    lines = [f"{figures['base']['model']} against {figures['tuned']['model']}"]
    lines += _layers(figures)
    for sae in figures["saes"]:
        lines += _sae(sae)
    if figures["crosscoder"]:
        lines += _crosscoder(figures["crosscoder"], (figures.get("control") or {}).get("crosscoder"))
    if figures["conclusions"]:
        lines.append("What holds of the second as of the first:")
        lines += [
            f"  {'holds' if one['holds'] else 'FAILS'}: {one['statement']} {one['figure']:.3f} (limit {one['limit']:g})"
            for one in figures["conclusions"]
        ]
    return "\n".join(lines)


def _layers(figures: Mapping[str, Any]) -> list[str]:
    if "layers" not in figures:
        return []
    whole = [row for row in figures["layers"] if row["source"] == "all"]
    most = max(whole, key=lambda row: row["change"])
    lines = [
        f"Residual stream: changed by {whole[0]['change']:.2%} of its norm after layer {whole[0]['layer']}, most, "
        f"{most['change']:.2%}, after layer {most['layer']}."
    ]
    for row in figures["predictions"]:
        lines.append(
            f"  {row['source']:<20} loss {row['ce_base']:.3f} -> {row['ce_tuned']:.3f} "
            f"[{row['ce_change_low']:+.3f}, {row['ce_change_high']:+.3f}], KL {row['kl']:.4f}, same likeliest token "
            f"{row['top1']:.1%}, {row['n_tokens']:,} tokens of {row['n_documents']} documents"
        )
    return lines


def _sae(sae: Mapping[str, Any]) -> list[str]:
    low, high = sae["fvu_change_interval"]
    lines = [
        f"{sae['name']} at {sae['hook']}: fvu {sae['fvu_base']:.4f} -> {sae['fvu_tuned']:.4f} [{low:+.4f}, {high:+.4f}]"
        f", {sae['changed']:,} of {sae['firing']:,} features that fire changed their rate ({sae['more_often']:,} more "
        f"often, {sae['less_often']:,} less), on {sae['n_rows']:,} rows."
    ]
    if sae.get("beyond") is not None:
        lines.append(
            f"  Of the {sae['changed']:,}, {sae['beyond']:,} changed beyond the control, in which "
            f"{sae['changed_in_control']:,} changed."
        )
    which = "beyond" if sae.get("beyond") is not None else "changed"
    homes = sorted((row for row in sae.get("by_source", ()) if row[which]), key=lambda row: -row[which])
    if homes:
        told = ", ".join(f"{row['source']} {row[which]:,} of {row['firing']:,}" for row in homes[:SHOWN])
        lines.append(f"  By the source that they fire on most: {told}.")
    if sae["mean_agreement"] is not None:
        cosine = sae["mean_decoder_cosine"]  # of features that fire in both models
        kept = "none fires in both" if cosine is None else f"decoder rows keep a cosine of {cosine:.4f}"
        lines.append(f"  Features fire on the same rows: mean agreement {sae['mean_agreement']:.3f}; {kept}.")
    for feature, examples in list(sae["examples"].items())[:SHOWN]:
        strongest = (examples["tuned"] or examples["base"])[:3]
        lines.append(f"  {feature}: " + " · ".join(repr(one["token"]) for one in strongest))
    return lines


def _crosscoder(found: Mapping[str, Any], control: Mapping[str, Any] | None) -> list[str]:
    places = found["places"]
    lines = [
        f"Crosscoder at {found['hook']}: fvu {found['fvu']:.4f}, {places.get('shared', 0):,} of {found['d_sae']:,} "
        f"features shared, {places.get('tuned', 0):,} seem to be of the second model alone, {places.get('base', 0):,} "
        "of the first."
    ]
    for which, words in (("tuned", "second"), ("base", "first")):
        verdicts = found["verdicts"][which]
        told = ", ".join(f"{verdict} {count:,}" for verdict, count in sorted(verdicts.items())) or "none"
        of_control = control["verdicts"][which] if control else {}
        beside = f" (in the control's crosscoder: {of_control.get('specific', 0):,} specific)" if control else ""
        lines.append(f"  of the {words}: {told}{beside}")
        for one in found["examples"][which][:SHOWN]:
            tokens = " · ".join(repr(example["token"]) for example in one["examples"][:4])
            lines.append(
                f"    {one['feature']} ({one['firings']:,} firings, nu error {one['nu_error']:.2f}, reconstruction "
                f"{one['nu_reconstruction']:.2f}): {tokens}"
            )
    return lines


def conclusions_table(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """Statement by statement what holds of each of several files, as text.

    Args:
        reports: by name of the file, the figures of its report.
    """
    names = list(reports)
    width = max(12, *(len(name) + 2 for name in names))
    statements = [one["statement"] for one in reports[names[0]]["conclusions"]]
    length = max(map(len, statements), default=0)
    lines = [" " * (length + 9) + "".join(f"{name:>{width}}" for name in names)]
    for place, statement in enumerate(statements):
        one = [reports[name]["conclusions"][place] for name in names]
        cells = "".join(f"{found['figure']:.3f}{' ' if found['holds'] else '!'}".rjust(width) for found in one)
        lines.append(f"{statement:<{length}} {one[0]['limit']:>8g}{cells}")
    return "\n".join([*lines, "A ! stands where it does not hold; the number before is its limit."])
