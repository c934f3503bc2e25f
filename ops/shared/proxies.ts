/** nginx, Caddy and HAProxy as the configurations of `ops/deploy/` set them up, in front of relays of a test's or tool's own. */
import { join } from "node:path";
import { temporaryDirectory } from "./directory.ts";
import { Child, freePort, ROOT, run } from "./processes.ts";
import { until } from "./wait.ts";

/** Replacements in a configuration: what stands there, and by what it is replaced. */
export type Edits = Record<string, string>;

/** Makes replacements in a text. @throws if one of them doesn't stand there exactly once */
export function edit(text: string, edits: Edits): string {
  for (const [what, by] of Object.entries(edits)) {
    if (text.split(what).length !== 2) throw new Error(`${JSON.stringify(what)} doesn't stand there once`);
    text = text.replace(what, () => by);
  }
  return text;
}

/** The text of a file of `ops/deploy/`. */
export const read = (file: string): Promise<string> => Bun.file(join(ROOT, "ops/deploy", file)).text();

/** Makes more replacements in a proxy's configuration and has it reload it, as `systemctl reload` does. */
type Reload = (edits: Edits) => Promise<void>;

/** A proxy that runs. */
export type Proxy = AsyncDisposable & { url: string; process: Child; reload: Reload };

/** A program that proxies. */
export type Program = {
  name: string;
  /** Why it can't be started here, to be appended to a test's name; or empty. */
  whyNot: string;
  /**
   * Starts it at a free port of 127.0.0.1 in front of the relay at another port.
   * @param edits more replacements @param inside as `startNginx` has it; nginx alone heeds it
   */
  start(relayPort: number, edits?: Edits, inside?: string[]): Promise<Proxy>;
};

/** Debian's servers are not on everybody's PATH. */
const PATH = `${process.env.PATH}:/usr/sbin`;
const find = (name: string): string | null => Bun.which(name, { PATH });
const whyNot = (name: string): string => (find(name) === null ? ` (skipped: no ${name} on this machine)` : "");

type Server = {
  /** The configuration in `ops/deploy/`. */
  file: string;
  edits: Edits;
  /** What has to stand around it. @param directory for the program's files */
  whole?(site: string, directory: string): string;
  /** @param conf the path of the whole configuration */
  command(conf: string): string[];
  /** The line of its log once it has taken a configuration. */
  taken: RegExp;
  reload(child: Child, conf: string): unknown;
};

/** Waits until a process acts on signals. HAProxy's master starts itself anew after each load, and loses what comes meanwhile. */
function heedsSignals({ pid }: Child): Promise<unknown> {
  const SIGTERM = 1n << 14n;
  return until("a handler of SIGTERM", async () => {
    const [, caught = "0"] = /^SigCgt:\t(\w+)$/m.exec(await Bun.file(`/proc/${pid}/status`).text()) ?? [];
    return (BigInt(`0x${caught}`) & SIGTERM) !== 0n;
  });
}

async function start(url: string, { file, edits, whole = (site) => site, command, taken, reload }: Server): Promise<Proxy> {
  await using stack = new AsyncDisposableStack();
  const directory = stack.use(await temporaryDirectory("proxy")).path;
  const conf = join(directory, file);
  let text = edit(whole(await read(file), directory), edits);
  await Bun.write(conf, text);
  const child = new Child(command(conf), { env: { HOME: directory }, endWith: "SIGTERM" });
  stack.defer(async () => void (await child.stop())); // by a signal that its workers hear of, unlike SIGKILL
  await child.line(taken);
  await heedsSignals(child);
  const running = stack.move();
  return {
    url,
    process: child,
    async reload(more) {
      text = edit(text, more);
      await Bun.write(conf, text);
      const times = () => child.lines.filter((line) => taken.test(line)).length;
      const before = times();
      await reload(child, conf);
      await until("the reload", () => times() > before);
      await heedsSignals(child);
    },
    [Symbol.asyncDispose]: () => running.disposeAsync(),
  };
}

/** Starts nginx with a file of `ops/deploy/` as its site. @param inside a command that runs another one somewhere else */
export function startNginx(url: string, file: string, edits: Edits, inside: string[] = []): Promise<Proxy> {
  return start(url, {
    file,
    edits,
    whole(site, directory) {
      const bodies = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map(
        (name) => `${name}_temp_path ${directory}/${name};`,
      );
      return `daemon off; worker_processes 1; pid ${directory}/pid; error_log stderr notice; events {}
        http { access_log off; ${bodies.join(" ")} ${site} }`;
    },
    command: (conf) => [...inside, find("nginx") as string, "-e", "stderr", "-c", conf],
    taken: /: start worker process /,
    reload: (child) => child.signal("SIGHUP"),
  });
}

/** nginx with `nginx.conf`. */
export const nginx: Program = {
  name: "nginx",
  whyNot: whyNot("nginx"),
  start(relayPort, edits = {}, inside) {
    const address = `127.0.0.1:${freePort()}`;
    const site = { "listen 80;": `listen ${address};`, "127.0.0.1:3000;": `127.0.0.1:${relayPort};` };
    return startNginx(`http://${address}`, "nginx.conf", { ...site, ...edits }, inside);
  },
};

/** The relays of a cluster as they stand in nginx-relays.conf. */
export const CLUSTER_IDS = ["4501", "4502", "4503"];

/** What relays of one machine, named by their ports, have in common in their environment. */
export const peersEnv = (ids: string[]) => ({ PEERS: ids.join(), PEER_ADDRESS: "127.0.0.1:{id}", HOST: "127.0.0.1" });

/**
 * Starts nginx in front of a cluster of at most three relays.
 * @param ids their ports @param edits more replacements in nginx-cluster.conf @param inside as `startNginx` has it
 */
export async function startClusterNginx(ids: string[], edits: Edits = {}, inside?: string[]): Promise<Proxy> {
  await using stack = new AsyncDisposableStack();
  const file = join(stack.use(await temporaryDirectory("cluster")).path, "relays.conf");
  const lines = (await read("nginx-relays.conf")).split("\n").flatMap((line) => {
    const place = CLUSTER_IDS.findIndex((id) => line.includes(`server 127.0.0.1:${id}`));
    if (place < 0) return [line];
    const id = ids[place];
    return id === undefined ? [] : [line.replace(CLUSTER_IDS[place] as string, id)];
  });
  await Bun.write(file, lines.join("\n"));
  const address = `127.0.0.1:${freePort()}`;
  const site = { "listen 80;": `listen ${address};`, "http {": `http { include ${file};` };
  const proxy = stack.use(await startNginx(`http://${address}`, "nginx-cluster.conf", { ...site, ...edits }, inside));
  const running = stack.move();
  return { ...proxy, [Symbol.asyncDispose]: () => running.disposeAsync() };
}

/** Caddy with the `Caddyfile`. */
export const caddy: Program = {
  name: "Caddy",
  whyNot: whyNot("caddy"),
  start(relayPort, edits = {}) {
    const url = `http://127.0.0.1:${freePort()}`;
    const admin = `127.0.0.1:${freePort()}`;
    const program = find("caddy") as string;
    return start(url, {
      file: "Caddyfile",
      edits: {
        "\nparty.example {": `\n${url} {`,
        "reverse_proxy 127.0.0.1:3000": `reverse_proxy 127.0.0.1:${relayPort}`,
        ...edits,
      },
      whole: (site) => `{\n\tadmin ${admin}\n}\n${site}`,
      command: (conf) => [program, "run", "--adapter", "caddyfile", "--config", conf],
      taken: /"serving initial configuration"|"load complete"/,
      reload: (_, conf) => run([program, "reload", "--adapter", "caddyfile", "--address", admin, "--config", conf]),
    });
  },
};

/** HAProxy with `haproxy.cfg`. */
export const haproxy: Program = {
  name: "HAProxy",
  whyNot: whyNot("haproxy"),
  start(relayPort, edits = {}) {
    const address = `127.0.0.1:${freePort()}`;
    return start(`http://${address}`, {
      file: "haproxy.cfg",
      edits: { "bind :80": `bind ${address}`, "server relay 127.0.0.1:3000": `server relay 127.0.0.1:${relayPort}`, ...edits },
      command: (conf) => [find("haproxy") as string, "-W", "-db", "-f", conf],
      taken: /Loading success/,
      reload: (child) => child.signal("SIGUSR2"),
    });
  },
};
