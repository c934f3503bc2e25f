/**
 * A Fly.io on one Linux machine: unmodified relays, each in a network namespace of its own, with Fly.io's DNS and proxy.
 *
 *   bun run ops/fly-local/start.ts [--machines 5] [--regions fra,iad] [--port 8090]
 *
 * dns.ts and proxy.ts are what Fly.io does, network.ts is the wires, wire.ts the TCP under the proxy.
 */
import { REGIONS } from "../../regions.ts";
import { badUsage, readFlags } from "../shared/flags.ts";
import { Child } from "../shared/processes.ts";
import { until } from "../shared/wait.ts";
import { startDns } from "./dns.ts";
import { inNamespace, openNetwork, dnsAddress, whyNoNetwork } from "./network.ts";
import { type Proxy, type ProxyEvent, startProxy } from "./proxy.ts";
import { connect, formatHead } from "./wire.ts";

type FlyLocalOptions = {
  /** How many machines; they get the regions in turn. At most 999. */
  machines: number;
  /** Fly.io's region codes. */
  regions: string[];
  /** The proxy's port on 127.0.0.1; 0 takes a free one. */
  port: number;
  /** More environment for every relay. */
  env?: Record<string, string>;
  onEvent?: (event: FlyEvent) => void;
  /** What a relay prints, a line at a time. */
  onLine?: (id: string, line: string) => void;
};

/** `exited` is told only of a relay that nobody stopped. */
export type FlyEvent = ProxyEvent | { kind: "exited"; id: string; code: number };

type FlyMachine = {
  id: string;
  /** Fly.io's region code. */
  region: string;
  /** In fdaa::/16. */
  address: string;
  /** Whether the proxy routes to it, and DNS shows it if it is `listed`. */
  started: boolean;
  listed: boolean;
  /** Whether its packets are dropped. */
  silent: boolean;
};

/** All that take an id throw if no machine has it. */
export type FlyLocal = AsyncDisposable & {
  /** Where clients connect: http://127.0.0.1:PORT */
  url: string;
  machines: readonly Readonly<FlyMachine>[];
  /** SIGTERM, and out of routing and DNS at once; resolves when the relay has exited. */
  stop(id: string): Promise<void>;
  /** SIGKILL, and nobody has noticed yet: routed to and in DNS, but connections are refused. */
  crash(id: string): Promise<void>;
  /** Drops the machine's packets: connections neither open nor fail. Routing and DNS don't notice. */
  silence(id: string): void;
  /** Takes a machine out of DNS; it runs and is routed to. */
  unlist(id: string): void;
  /** Undoes all of these; resolves when the relay answers. */
  start(id: string): Promise<void>;
  /** Lets DNS hang, or answer again. */
  hangDns(hangs: boolean): void;
  /** TCP connections that the machine has accepted since the network was made, those of the proxy too. */
  accepted(id: string): number;
};

type Machine = FlyMachine & { netName: string; namespace: string; relay: Child | null };

const app = "party-sockets";
const mostMachines = 999; // their ids count in three digits
const relayPort = 8080;
const startMs = 20_000; // twenty relays start at once on two cores

/**
 * Starts a Fly.io of `machines` relays; resolves when all of them answer.
 * @throws if namespaces can't be made (see `whyNoNetwork`), the port is taken, or a relay doesn't start
 */
export async function startFlyLocal(options: FlyLocalOptions): Promise<FlyLocal> {
  const network = openNetwork();
  const machines: Machine[] = [];
  const inEdge = <T>(work: () => T): T => inNamespace(network.edge, work);
  const dial: typeof connect = (...to) => inEdge(() => connect(...to));
  const closers: (() => void)[] = [];
  const close = (): void => {
    process.off("exit", close);
    for (const machine of machines) {
      machine.started = false;
      machine.relay?.signal("SIGKILL");
    }
    for (const closer of closers.splice(0)) closer();
    network.close();
  };
  process.on("exit", close);

  async function launch(machine: Machine): Promise<void> {
    const command = ["ip", "netns", "exec", machine.namespace, process.execPath, "run", "server.ts"];
    const env = {
      PORT: `${relayPort}`,
      FLY_APP_NAME: app,
      FLY_REGION: machine.region,
      FLY_MACHINE_ID: machine.id,
      FLY_PRIVATE_IP: machine.address,
      ...options.env,
    };
    const relay = new Child(command, { env, onLine: (line) => options.onLine?.(machine.id, line) });
    machine.relay = relay;
    machine.started = true;
    void relay.exited.then((code) => {
      machine.relay = null;
      if (!machine.started) return;
      if (code === 0) machine.started = false; // idle; after a crash Fly.io would start it again
      options.onEvent?.({ kind: "exited", id: machine.id, code });
    });

    const answers = async (): Promise<boolean> => {
      if (relay.exitCode !== null) throw new Error(`${machine.id} ended; it printed:\n${relay.lines.join("\n")}`);
      return isHealthy(machine.address, dial);
    };
    await until(`an answer of ${machine.id}`, answers, startMs);
  }

  const find = (id: string): Machine => {
    const machine = machines.find((candidate) => candidate.id === id);
    if (machine === undefined) throw new Error(`no machine ${id}`);
    return machine;
  };

  try {
    for (let number = 1; number <= options.machines; number += 1) {
      const region = options.regions[(number - 1) % options.regions.length] ?? "";
      const id = `d8910000000${`${number}`.padStart(3, "0")}`; // 14 digits, as Fly.io's have
      const address = `fdaa:0:1:a7b::${number.toString(16)}`;
      const netName = `m${number}`;
      const namespace = network.add(netName, address);
      const shown = { started: false, listed: true, silent: false };
      machines.push({ id, region, address, ...shown, netName, namespace, relay: null });
    }
    const dns = await inEdge(() =>
      startDns({
        app,
        hostname: dnsAddress,
        port: 53,
        machines: () => machines.filter(({ started, listed }) => started && listed),
      }),
    );
    closers.push(() => dns.close());
    const proxy: Proxy = startProxy({
      app,
      hostname: "127.0.0.1",
      port: options.port,
      machines: () => machines.filter(({ started }) => started).map((machine) => ({ ...machine, port: relayPort })),
      onEvent: (event) => options.onEvent?.(event),
      dial,
    });
    closers.push(() => proxy.close());
    await Promise.all(machines.map(launch));

    return {
      url: proxy.url,
      machines,
      async stop(id) {
        const machine = find(id);
        machine.started = false;
        machine.relay?.signal("SIGTERM");
        await machine.relay?.exited;
      },
      async crash(id) {
        const { relay } = find(id);
        relay?.signal("SIGKILL");
        await relay?.exited;
      },
      silence(id) {
        const machine = find(id);
        if (!machine.silent) network.silence(machine.netName, true);
        machine.silent = true;
      },
      unlist(id) {
        find(id).listed = false;
      },
      async start(id) {
        const machine = find(id);
        machine.listed = true;
        if (machine.silent) network.silence(machine.netName, false);
        machine.silent = false;
        if (machine.relay === null) await launch(machine);
      },
      hangDns(hangs) {
        dns.silent = hangs;
      },
      accepted: (id) => network.accepted(find(id).netName),
      async [Symbol.asyncDispose]() {
        const exits = machines.map(({ relay }) => relay?.exited);
        close();
        await Promise.all(exits);
      },
    };
  } catch (error) {
    close();
    throw error;
  }
}

async function isHealthy(address: string, dial: typeof connect): Promise<boolean> {
  const wire = await dial(address, relayPort, 1_000);
  if (typeof wire === "string") return false;
  wire.write(formatHead({ start: "GET /health HTTP/1.1", lines: [], headers: new Map() }, { Host: app }));
  const answer = await wire.head();
  wire.destroy();
  return answer?.start.split(" ")[1] === "200";
}

function describe(event: FlyEvent): string {
  switch (event.kind) {
    case "replay":
      return `replay    ${event.path}  ${event.from} -> ${event.to}  (${event.replay})`;
    case "fallback":
      return `fallback  ${event.path}  ${event.from} -> ${event.to}  (${event.replay}: ${event.reason})`;
    case "error":
      return `ERROR     ${event.path}  ${event.from}: ${event.message}`;
    case "exited":
      return `exited    ${event.id} with code ${event.code}`;
  }
}

const usage = "bun run ops/fly-local/start.ts [--machines 5] [--regions fra,iad] [--port 8090]";
const commands = `commands, with an ID or its last digits:
  stop ID      SIGTERM, and out of routing and DNS
  crash ID     SIGKILL, still routed to and in DNS
  silence ID   drop its packets
  unlist ID    take it out of DNS
  start ID     undo the above
  dns off|on   let DNS hang, or answer again
  list, quit`;

async function main(): Promise<number> {
  const values = readFlags(usage, { machines: { type: "string" }, regions: { type: "string" }, port: { type: "string" } });
  const machines = Number(values.machines ?? 5);
  const regions = (values.regions ?? "fra,iad").split(",");
  const port = Number(values.port ?? 8090);
  const unknown = regions.find((region) => !REGIONS.includes(region));
  if (!(Number.isInteger(machines) && machines >= 1 && machines <= mostMachines))
    badUsage(usage, `--machines must be a whole number from 1 to ${mostMachines}`);
  if (unknown !== undefined) badUsage(usage, `--regions: ${JSON.stringify(unknown)} isn't in regions.ts`);
  if (!(Number.isInteger(port) && port >= 0 && port <= 65535)) badUsage(usage, "--port must be a whole number from 0 to 65535");

  const reason = whyNoNetwork();
  if (reason !== null) {
    console.error(`fly-local can't run: ${reason}.`);
    console.error("It needs Linux, root and iproute2: sudo bun run ops/fly-local/start.ts, or a privileged container.");
    return 1;
  }
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"]) process.on(signal, () => process.exit(130));

  await using fly = await startFlyLocal({
    machines,
    regions,
    port,
    onEvent: (event) => console.log(describe(event)),
    onLine: (id, line) => console.log(`${id}  ${line}`),
  });
  const list = (): void => {
    for (const { id, region, address, started, listed, silent } of fly.machines) {
      const state = [started ? "started" : "stopped", ...(listed ? [] : ["unlisted"]), ...(silent ? ["silent"] : [])];
      console.log(`  ${id}  ${region}  ${address}  ${state.join(", ")}`);
    }
  };
  list();
  console.log(`entry: ${fly.url}`);
  console.log(`test:  LIVE_URL=${fly.url} LIVE_MACHINES=${liveMachines(fly)} bun run test:live`);
  console.log(commands);
  for await (const line of console) {
    const [command = "", argument = ""] = line.trim().split(/\s+/);
    const id = fly.machines.find((machine) => argument !== "" && machine.id.endsWith(argument))?.id ?? argument;
    try {
      if (command === "quit") return 0;
      else if (command === "list") list();
      else if (command === "stop") await fly.stop(id);
      else if (command === "crash") await fly.crash(id);
      else if (command === "silence") fly.silence(id);
      else if (command === "unlist") fly.unlist(id);
      else if (command === "start") await fly.start(id);
      else if (command === "dns" && /^(on|off)$/.test(argument)) fly.hangDns(argument === "off");
      else if (command !== "") console.log(commands);
    } catch (error) {
      console.log((error as Error).message);
    }
  }
  return new Promise(() => {}); // no more input: until a signal
}

/** The machines as `live.test.ts` takes them. */
export function liveMachines({ machines }: Pick<FlyLocal, "machines">): string {
  return machines.map(({ id, region }) => `${id}:${region}`).join(",");
}

if (import.meta.main) {
  process.exitCode = await main().catch((error: unknown) => {
    console.error(`fly-local: ${error instanceof Error ? error.message : String(error)}`);
    return 1;
  });
}
