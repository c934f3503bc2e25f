/** What the tests of the demo share: a relay as a process of its own, which can be stopped and started again. */

const ROOT = `${import.meta.dir}/../..`;

export type RelayProcess = {
  url: string;
  port: number;
  /** Ends it and waits until it is gone. */
  stop(signal: "SIGTERM" | "SIGKILL"): Promise<void>;
} & AsyncDisposable;

/** Starts `server.ts` and waits until it listens. @param port 0 takes a free one */
export async function spawnRelay(port = 0): Promise<RelayProcess> {
  const child = Bun.spawn([process.execPath, "server.ts"], {
    cwd: ROOT,
    env: { PATH: process.env.PATH, PORT: String(port), DRAIN_SECONDS: "1" },
    stdout: "pipe",
    stderr: "inherit",
  });
  let log = "";
  let listening: string | undefined;
  const decoder = new TextDecoder();
  for await (const chunk of child.stdout) {
    log += decoder.decode(chunk, { stream: true });
    listening = /\bport"?[=:](\d+)/.exec(log)?.[1];
    if (listening) break;
  }
  if (!listening) throw new Error(`The relay didn't start: ${log}`);
  const stop = async (signal: "SIGTERM" | "SIGKILL") => {
    child.kill(signal);
    await child.exited;
  };
  return {
    url: `http://localhost:${listening}`,
    port: Number(listening),
    stop,
    [Symbol.asyncDispose]: () => stop("SIGKILL"),
  };
}
