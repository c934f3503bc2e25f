/** Reads what a relay says of itself. */
import { PATIENCE_MS } from "./wait.ts";

/** One line of Prometheus' text format. */
export type Sample = { name: string; labels: Record<string, string>; value: number };

const SAMPLE = /^(\w+)\{((?:\w+="(?:[^"\\]|\\.)*",?)*)\} (\S+)$/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;
const UNESCAPED: Record<string, string> = { n: "\n", "\\": "\\", '"': '"' };

/** Reads Prometheus' text format. @throws at a line that is neither a comment nor a sample with labels */
export function parseMetrics(text: string): Sample[] {
  return text
    .split("\n")
    .filter((line) => line !== "" && !line.startsWith("#"))
    .map((line) => {
      const [, name = "", pairs = "", value] = SAMPLE.exec(line) ?? [];
      if (name === "") throw new Error(`not a sample: ${line}`);
      const labels: Record<string, string> = {};
      for (const [, key = "", escaped = ""] of pairs.matchAll(LABEL))
        labels[key] = escaped.replace(/\\(.)/g, (_, character: string) => UNESCAPED[character] ?? "?");
      return { name, labels, value: Number(value) };
    });
}

/** The text of a relay's `/metrics`. @throws if it doesn't answer */
export function scrape(url: string): Promise<string> {
  return get(`${url}/metrics`);
}

/** The values of one metric of a relay by what they are labelled beyond instance, region and version. @throws as `scrape` does */
export async function readMetric(url: string, name: string): Promise<Record<string, number>> {
  const series = parseMetrics(await scrape(url)).filter((one) => one.name === name);
  return Object.fromEntries(
    series.map(({ labels: { instance: _, region: __, version: ___, ...own }, value }) => [Object.values(own).join(), value]),
  );
}

/** How a relay is. `text` is its answer to `GET /`; what isn't counted there may be a second old. */
export type Vitals = { rooms: number; clients: number; internalErrors: number; rssBytes: number; text: string };

/** Asks a relay how it is. @throws if it doesn't answer */
export async function vitals(url: string): Promise<Vitals> {
  const [metrics, text] = await Promise.all([scrape(url), get(`${url}/`)]);
  const samples = parseMetrics(metrics);
  const value = (name: string, code?: string): number =>
    samples.find((sample) => sample.name === name && sample.labels.code === code)?.value ?? NaN;
  const counted = (what: string): number | undefined => {
    const digits = new RegExp(`^${what}: (\\d+)$`, "m").exec(text)?.[1];
    return digits === undefined ? undefined : Number(digits);
  };
  return {
    rooms: counted("rooms") ?? value("party_sockets_rooms"),
    clients: counted("clients") ?? value("party_sockets_clients"),
    internalErrors: value("party_sockets_errors_total", "internal"),
    rssBytes: value("process_resident_memory_bytes"),
    text,
  };
}

async function get(url: string): Promise<string> {
  const signal = AbortSignal.timeout(PATIENCE_MS);
  return (await fetch(url, { redirect: "manual", keepalive: false, signal })).text();
}
