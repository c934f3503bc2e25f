/** What came of everything at once, in Markdown. */
import type { Row } from "../siege.ts";
import type { Report } from "./parties.ts";
import type { Alert, Judgement, Life } from "./watch.ts";

/** How numbers are written. */
export const mebi = (bytes: number) => (bytes / 1024 / 1024).toFixed(0);
export const ms = (value: number | null | undefined) => (value == null ? "?" : value.toFixed(0));
const s = (value: number) => `${value.toFixed(0)} s`;

/** What is left of an alert's name in a table. */
export const short = (alert: string) => alert.replace("PartySockets", "");

/** Sees whether the alerts did what they should. @returns lines of a table, and what is wrong */
export function judge(judgements: Judgement[], alerts: Alert[]): { lines: string[]; faults: string[] } {
  const faults = alerts
    .filter(({ name }) => !judgements.some(({ alert }) => alert === name))
    .map(({ name }) => `nobody has judged ${name}`);
  const lines = judgements.map(({ alert, needsSeconds, heldSeconds, mayFire, mustFire }) => {
    const active = alerts.filter(({ name }) => name === alert);
    const hasFired = active.some(({ firedAt }) => firedAt !== undefined);
    const held = heldSeconds < 0 ? "never held" : `held for ${s(heldSeconds)} at most, ${s(needsSeconds)} are needed`;
    if (hasFired && !mayFire) faults.push(`${alert} fired, but its condition ${held}`);
    if (!hasFired && mustFire) faults.push(`${alert} didn't fire, although its condition ${held}`);
    let verdict = hasFired ? "fired" : "quiet, as it should be";
    if (!hasFired && heldSeconds >= needsSeconds)
      verdict = mustFire ? "**should have fired**" : "quiet: its reason was too near to a scrape's gap";
    const times = active.map(({ what, pendingAt, firedAt, overAt }) => {
      const fires = firedAt === undefined ? "never fired" : `fired at ${s(firedAt)}`;
      return `${what} seen at ${s(pendingAt)}, ${fires}, ${overAt === undefined ? "still there" : `over at ${s(overAt)}`}`.trim();
    });
    return row(short(alert), verdict, held, times.join("; ") || "–");
  });
  return { lines, faults };
}

/** All that was found. */
export type Findings = {
  head: string;
  lives: Life[];
  /** How each life ended. */
  endings: string[];
  parties: Report;
  sieges: Row[];
  alertLines: string[];
  faults: string[];
};

export function report({ head, lives, endings, parties, sieges, alertLines, faults }: Findings): string {
  return [
    head,
    "",
    ...table("relay, seconds, MiB at most, lag at most ms, frames out, cut as slow, refused as full, this tool late at most ms"),
    ...lives.map(({ name, from, to, rssMax, lagMax, deliveries, cut, refused, ownMs }) =>
      row(
        name,
        ms(to - from),
        mebi(rssMax),
        ms(lagMax * 1000),
        deliveries.toLocaleString("en"),
        String(cut),
        String(refused),
        ms(ownMs),
      ),
    ),
    "",
    ...endings,
    "",
    `ordinary parties: ${parties.rooms} rooms, ${parties.sent} messages, ${parties.delivered} deliveries, ${parties.lost} lost, ` +
      `${parties.endedWithRoom} owed by rooms that ended with their relay, ${parties.reconnects} attempts to reconnect`,
    "",
    ...table("attack, worst ms, p99 ms, own ms, lost, what became of it (✗: not as on a relay of its own)"),
    ...sieges.map(({ name, report: seen, text, held }) => {
      const lost = seen === undefined ? "all" : String(seen.lost);
      return row(name, ms(seen?.worstMs), ms(seen?.p99Ms), ms(seen?.ownMs), lost, `${held ? "" : "✗ "}${text}`);
    }),
    "",
    ...table("alert, verdict, its condition (by a look each second), by Prometheus"),
    ...alertLines,
    "",
    ...(faults.length === 0 ? ["no faults"] : [`faults: ${faults.length}`, ...faults.map((text) => `  ${text}`)]),
  ].join("\n");
}

const row = (...cells: string[]) => `| ${cells.join(" | ")} |`;
const table = (heads: string) => [row(...heads.split(", ")), row(...heads.split(", ").map(() => "---"))];
