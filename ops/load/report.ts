/** What was found, as text. */
import { cpus, release } from "node:os";
import { coldStart, figuresOf, median } from "./compare.ts";
import type { Scenario, Span, Target } from "./options.ts";
import { figure, milliseconds, percent, thousands } from "./progress.ts";
import type { Latencies, Result, Stretch } from "./run.ts";
import { SPINS } from "./sender.ts";
import { pinned, SERVER_CORE, TOOL_CORE } from "./target.ts";

const FULL_CORE = 0.9;
const BUSY_MACHINE = 0.03; // a quiet one shows under 1 % with server and tool on a core each
const LATE_MS = 4; // a loop that runs once a millisecond sends at most this late; beyond it latencies are the tool's

const megabytes = (bytes: number) => `${(bytes / 1e6).toFixed(1)} MB`;
const spansText = (spans: Span[]) => spans.map(({ from, to }) => `${from} to ${to} s`).join(", ");

/** Where the figures come from; no figure means anything without it. */
export function machine(targets: Target[]): string {
  const cores = cpus();
  const where = [
    cores[0]?.model.trim() ?? "unknown CPU",
    `${cores.length} cores`,
    `${process.platform} ${release()}`,
    `Bun ${Bun.version}`,
  ];
  if (pinned(targets)) where.push(`server on core ${SERVER_CORE}, tool on core ${TOOL_CORE}`);
  return where.join(", ");
}

export const roomsText = (rooms: number) => (rooms === 1 ? "1 room" : `${thousands(rooms)} rooms`);

/** The scenario in one line. */
export function describe(scenario: Scenario): string {
  const { mode, rooms, idleRooms, clients, cpu, rival } = scenario;
  const parts = [`${roomsText(rooms + idleRooms)} of ${clients}`];
  if (idleRooms > 0) parts.push(`${rooms} of them busy`);
  if (mode === "connect") parts.push("connecting only");
  else if (mode === "idle") parts.push(`idle for ${scenario.seconds} s`);
  else if (mode === "flap") parts.push(`${scenario.flap} reconnect at once`);
  else parts.push(...trafficText(scenario));
  if (cpu !== undefined) {
    const { quota, spans } = cpu;
    const when = spans === undefined ? "" : ` from ${spansText(spans)}`;
    parts.push(`the server has ${quota.runMicros / 1000} ms of CPU in each ${quota.periodMicros / 1000} ms${when}`);
  }
  if (rival.length > 0) parts.push(`a busy process on the server's core from ${spansText(rival)}`);
  return parts.join(", ");
}

function trafficText({ senders, rate, game, targeted, bytes, payload, phase, seconds }: Scenario): string[] {
  const size = `${bytes ?? "65 to 90"} B (${payload})`;
  const rateText = (hz: number) => `${figure(hz)} a second`;
  if (game !== undefined)
    return [
      `${size}: ${rateText(game.host)} from each host to all`,
      `${rateText(game.others)} from each other to its host`,
      `phase ${phase}`,
      `${seconds} s`,
    ];
  return [
    `${senders} sending ${size}${targeted ? " to one" : ""}`,
    rate === 0 ? "saturated" : `${rateText(rate)} each, phase ${phase}`,
    `${seconds} s`,
  ];
}

const latencyText = ({ p50, p90, p99, p999, max }: Latencies) =>
  `p50 ${milliseconds(p50)}  p90 ${milliseconds(p90)}  p99 ${milliseconds(p99)}  p99.9 ${milliseconds(p999)}  ` +
  `worst ${milliseconds(max)}`;

/** What one run found. `show` adds what isn't always wanted. */
export function report(result: Result, scenario: Scenario, show: { series?: boolean; cold?: boolean } = {}): string {
  const { connect, flap, serverBytes, throttling } = result;
  const isTraffic = scenario.mode === "traffic";
  const cpu = (micros: number | null) => (micros === null ? "" : `, ${figure(micros)} µs of server CPU each`);
  const rows: [string, string][] = [
    ["members", thousands(connect.members)],
    ["connecting", `${connect.seconds.toFixed(2)} s${cpu(connect.cpuMicrosPerMember)}`],
  ];
  if (flap !== null)
    rows.push([
      "reconnecting",
      `${thousands(flap.members)} at once in ${flap.seconds.toFixed(2)} s${cpu(flap.cpuMicrosPerMember)}`,
    ]);
  if (isTraffic)
    rows.push(
      ["messages in", thousands(result.messages)],
      ["deliveries", thousands(result.deliveries)],
      ["deliveries a second", thousands(result.deliveriesPerSecond)],
      ["latency, ms", latencyText(result.latencyMs)],
    );
  if (result.serverCpuCore !== null && result.series.length > 0)
    rows.push([
      "server CPU",
      `${percent(result.serverCpuCore)} of a core` +
        (isTraffic ? `, ${figure(result.serverCpuMicrosPerDelivery)} µs a delivery` : ""),
    ]);
  const coldly = show.cold ? coldStart(result) : undefined;
  if (result.proxyCpuMicros !== null)
    rows.push(["nginx CPU", `${figure(result.proxyCpuMicros / result.deliveries)} µs a delivery`]);
  if (Object.keys(result.roomsOf).length > 1)
    rows.push(["rooms on each relay", Object.values(result.roomsOf).map(thousands).join(" / ")]);
  if (coldly !== undefined)
    rows.push([
      "cold start",
      `${figure(coldly.first)} µs a delivery in the first second, ${figure(coldly.last)} in second ${result.series.length}: ` +
        `${coldly.ratio.toFixed(2)} times as much`,
    ]);
  if (throttling !== null)
    rows.push([
      "throttled",
      `in ${throttling.throttled} of ${throttling.periods} periods, for ${throttling.seconds.toFixed(1)} s in all`,
    ]);
  if (serverBytes !== null)
    rows.push([
      "server memory",
      `${megabytes(serverBytes.atStart)} at start, ${megabytes(serverBytes.connected)} connected, ` +
        `${megabytes(serverBytes.atEnd)} at the end; ${thousands(serverBytes.perMember)} bytes a member above the start`,
    ]);
  if (isTraffic)
    rows.push(
      ["load tool", `${percent(result.toolCpuCore)} of a core, sent ${milliseconds(result.lateMsP99)} ms late (p99)`],
      [
        "lost / doubled / out of order / astray",
        [result.lost, result.doubled, result.outOfOrder, result.astray].map(thousands).join(" / "),
      ],
    );
  for (const [code, count] of Object.entries(result.closed)) rows.push([`closed with ${code}`, thousands(count)]);
  for (const error of result.errors) rows.push(["error", error]);
  const lines = [table(rows)];
  if (show.series || show.cold) lines.push("", seriesText(result.series));
  if (result.histogram.length > 0) lines.push("", histogramText(result.histogram));
  for (const note of notes(result, scenario)) lines.push("", `  Note: ${note}.`);
  return lines.join("\n");
}

function table(rows: [string, string][]): string {
  const width = Math.max(...rows.map(([name]) => name.length));
  return rows.map(([name, value]) => `  ${name.padEnd(width)}  ${value}`).join("\n");
}

function seriesText(series: Stretch[]): string {
  const hasQuota = series.some(({ throttling }) => throttling !== null);
  const heads = ["second", "deliveries", "p50 ms", "p99 ms", "worst ms", "core", "µs a delivery"];
  if (hasQuota) heads.push("throttled");
  const line = (cells: string[]) => `  ${cells.map((cell, i) => cell.padStart(heads[i]?.length ?? 0)).join("  ")}`;
  const rows = series.map((stretch, i) => {
    const { deliveries, latencyMs, serverCpuCore, serverCpuMicrosPerDelivery, throttling } = stretch;
    const latencies = [latencyMs.p50, latencyMs.p99, latencyMs.max].map(milliseconds);
    const throttled = throttling === null ? [] : [`${throttling.throttled}/${throttling.periods}`];
    const cpu = [percent(serverCpuCore), figure(serverCpuMicrosPerDelivery)];
    return line([String(i + 1), thousands(deliveries), ...latencies, ...cpu, ...throttled]);
  });
  return [line(heads), ...rows].join("\n");
}

function histogramText(rows: Result["histogram"]): string {
  const total = rows.reduce((sum, [, count]) => sum + count, 0);
  const most = Math.max(...rows.map(([, count]) => count));
  return rows
    .map(([end, count]) => {
      const bar = "#".repeat(Math.ceil((count / most) * 40));
      return `  < ${String(end).padStart(6)} ms ${((count / total) * 100).toFixed(2).padStart(6)} % ${bar}`;
    })
    .join("\n");
}

/** What a reader of the figures has to know. */
export function notes(result: Result, { mode, rate, game, cpu, rival }: Scenario): string[] {
  const found: string[] = [];
  const isTraffic = mode === "traffic";
  const isSaturated = isTraffic && rate === 0 && game === undefined;
  const spins = SPINS && isTraffic && !isSaturated; // a whole core is what it is meant to use then
  const isFull = (result.serverCpuCore ?? 0) > FULL_CORE;
  if (!spins && result.toolCpuCore > FULL_CORE)
    found.push(
      isFull
        ? "server and load tool both filled their cores: latencies are partly the tool's"
        : `the load tool, not the server, was the bottleneck: it used ${percent(result.toolCpuCore)} of its core`,
    );
  else if (isSaturated && cpu === undefined && rival.length === 0 && result.serverCpuCore !== null && !isFull)
    found.push(`the server was not saturated (${percent(result.serverCpuCore)} of a core): raise --window or --rooms`);
  if (result.lateMsP99 > LATE_MS)
    found.push(`the load tool sent up to ${result.lateMsP99.toFixed(1)} ms late (p99): latencies are partly its own`);
  const { server, tool } = result.waited;
  const hasToWait = cpu !== undefined || rival.length > 0;
  const sharesCores = result.proxyCpuMicros !== null; // nginx with a relay, and perhaps a relay with the tool
  if (!sharesCores && Math.max(hasToWait ? 0 : (server ?? 0), tool) > BUSY_MACHINE)
    found.push(
      `the machine is busy with something else: the server waited ${percent(server)} of the time for a core, ` +
        `the load tool ${percent(tool)}`,
    );
  return found;
}

/** Medians of all figures by which the targets are compared, and their ratios. */
export function comparison(targets: Target[], results: Result[][], scenario: Scenario, cold: boolean): string {
  return figuresOf(scenario, cold)
    .map(({ name, of }) => {
      const medians = results.map((runs) => median(runs.map(of)));
      const lines = targets.map(({ name }, i) => {
        const each = (results[i] as Result[]).map((run) => figure(of(run))).join(", ");
        return `  ${name}: ${each}; median ${figure(medians[i] ?? null)}`;
      });
      if (targets.length > 1) lines.push(`  ratio of medians: ${ratioOf(medians)?.toFixed(3) ?? "n/a"}`);
      return `${name}\n${lines.join("\n")}`;
    })
    .join("\n");
}

/** The first by the second; null if either isn't known. */
export function ratioOf([ours, theirs]: (number | null)[]): number | null {
  return ours && theirs ? ours / theirs : null;
}
