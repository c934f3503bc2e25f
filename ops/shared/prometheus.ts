/** A real Prometheus (Debian's package) with a configuration of a test's or tool's own. */
import { join } from "node:path";
import { temporaryDirectory } from "./directory.ts";
import { Child, freePort } from "./processes.ts";
import { PATIENCE_MS } from "./wait.ts";

/** Why none can be started here, to be appended to a test's name; undefined if one can. */
export const whyNoPrometheus = Bun.which("prometheus") === null ? " (skipped: no prometheus on this machine)" : undefined;

/** A Prometheus that runs. */
export type PrometheusServer = AsyncDisposable & {
  process: Child;
  /** Puts a path of the HTTP API to it. @throws with what it says is wrong, or after `ms` */
  ask(path: string, query?: Record<string, string>, ms?: number): Promise<any>;
};

/** Starts one, which may not answer yet. @param config what stands in `prometheus.yml`; JSON is YAML, too */
export async function startPrometheusServer(config: object): Promise<PrometheusServer> {
  await using stack = new AsyncDisposableStack();
  const { path: directory } = stack.use(await temporaryDirectory("prometheus"));
  await Bun.write(join(directory, "prometheus.yml"), JSON.stringify(config));
  const address = `127.0.0.1:${freePort()}`;
  const files = [`--config.file=${directory}/prometheus.yml`, `--storage.tsdb.path=${directory}/data`];
  const process = stack.use(new Child(["prometheus", ...files, `--web.listen-address=${address}`, "--log.level=error"]));
  const running = stack.move();
  return {
    process,
    async ask(path, query = {}, ms = PATIENCE_MS) {
      const url = `http://${address}/api/v1/${path}?${new URLSearchParams(query)}`;
      const answer = await fetch(url, { signal: AbortSignal.timeout(ms) });
      const { status, data, error } = (await answer.json()) as { status: string; data: unknown; error?: string };
      if (status !== "success") throw new Error(error);
      return data;
    },
    [Symbol.asyncDispose]: () => running.disposeAsync(),
  };
}
