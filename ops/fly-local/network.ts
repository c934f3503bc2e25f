/**
 * A private network of network namespaces: one for each machine, and one, the edge, with the bridge that joins them and
 * the address that DNS answers on. Nothing in the host's own network changes.
 */
import { dlopen } from "bun:ffi";
import { closeSync, existsSync, mkdirSync, openSync, readdirSync, readFileSync, rmdirSync, rmSync, writeFileSync } from "node:fs";

/** Where machines find DNS, as on Fly.io. */
export const dnsAddress = "fdaa::3";

type Network = {
  /** The namespace in which machines can be reached and DNS listens. */
  edge: string;
  /** Adds a machine with an address in fdaa::/16, and gives the name of its namespace. */
  add(name: string, address: string): string;
  /** Drops every packet from and to a machine, without a sign of it on either side; or stops doing so. */
  silence(name: string, silent: boolean): void;
  /** Connections that the kernel has accepted in a machine's namespace since it was made. */
  accepted(name: string): number;
  /** Removes everything. Processes inside have to be ended too: they would go on, in a network without a name. */
  close(): void;
};

const prefix = "fly-local";
const namespaces = "/run/netns";
const resolvers = "/etc/netns"; // `ip netns exec` puts NAME/resolv.conf from here in place of the host's
let networks = 0;

/** Why no network can be made here, in words for the person who wants one, or null. */
export function whyNoNetwork(): string | null {
  if (process.platform !== "linux") return "network namespaces need Linux";
  if (process.getuid?.() !== 0) return "making network namespaces needs root";
  if (Bun.which("ip") === null) return "the ip command is missing (Debian: apt install iproute2)";
  try {
    const network = openNetwork();
    try {
      network.add("m1", "fdaa::1");
    } finally {
      network.close();
    }
  } catch (error) {
    return `network namespaces can't be made here: ${(error as Error).message}`;
  }
  return null;
}

/** Makes a network with no machines yet. Removes first what runs that were killed have left behind. */
export function openNetwork(): Network {
  removeLeftovers();
  networks += 1;
  const run = `${prefix}-${process.pid}-${networks}`;
  const edge = `${run}-edge`;
  const names = [edge];
  const nameOf = (machine: string): string => `${run}-${machine}`;

  const close = (): void => names.splice(0).forEach(remove);

  try {
    ip(`netns add ${edge}`);
    ipBatch(edge, [
      "link set lo up",
      "link add name bridge0 type bridge mcast_snooping 0 forward_delay 0 stp_state 0",
      `addr add ${dnsAddress}/16 dev bridge0 nodad`,
      "link set bridge0 up",
    ]);
    keepAsking(edge, "bridge0");
    // A connection that the proxy has given up goes after 7 s, not after minutes. The setting holds for IPv6 too.
    inNamespace(edge, () => writeFileSync("/proc/sys/net/ipv4/tcp_syn_retries", "2"));
  } catch (error) {
    close();
    throw error;
  }

  return {
    edge,
    add(machine, address) {
      const name = nameOf(machine);
      names.push(name);
      mkdirSync(`${resolvers}/${name}`, { recursive: true });
      writeFileSync(`${resolvers}/${name}/resolv.conf`, `nameserver ${dnsAddress}\n`);
      ip(`netns add ${name}`);
      ip(`link add name eth0 netns ${name} type veth peer name ${machine} netns ${edge}`);
      ipBatch(name, ["link set lo up", `addr add ${address}/16 dev eth0 nodad`, "link set eth0 up"]);
      ipBatch(edge, [`link set ${machine} master bridge0 up`]);
      keepAsking(name, "eth0");
      return name;
    },
    silence(machine, silent) {
      // Outside the bridge the wire leads nowhere, but still looks connected to the machine.
      ip(`-n ${edge} link set ${machine} ${silent ? "nomaster" : "master bridge0"}`);
    },
    accepted(machine) {
      const counters = inNamespace(nameOf(machine), () => readFileSync("/proc/thread-self/net/snmp", "utf8"));
      const [names, values] = counters.split("\n").filter((line) => line.startsWith("Tcp:"));
      const column = names?.split(" ").indexOf("PassiveOpens") ?? -1;
      return Number(values?.split(" ")[column]);
    },
    close,
  };
}

/**
 * Runs `work` with this thread in another network namespace. A socket belongs for good to the namespace it is made in, so
 * `Bun.listen`, `Bun.udpSocket` and `Bun.connect` to a literal address can be moved this way: they make theirs before
 * they return. `fetch`, node:net and whatever starts a thread can't be.
 */
export function inNamespace<T>(name: string, work: () => T): T {
  const home = openSync("/proc/thread-self/ns/net", "r");
  const there = openSync(`${namespaces}/${name}`, "r");
  try {
    enter(there);
    try {
      return work();
    } finally {
      enter(home);
    }
  } finally {
    closeSync(there);
    closeSync(home);
  }
}

let setns: ((fd: number, kind: number) => number) | undefined;

function enter(namespace: number): void {
  setns ??= dlopen("libc.so.6", { setns: { args: ["i32", "i32"], returns: "i32" } }).symbols.setns;
  const newNet = 0x40000000; // CLONE_NEWNET
  if (setns(namespace, newNet) !== 0) throw new Error("setns failed");
}

/** An address that nobody answers for stays silent, rather than fail after the usual three queries. */
function keepAsking(name: string, device: string): void {
  inNamespace(name, () => {
    writeFileSync(`/proc/sys/net/ipv6/neigh/${device}/mcast_solicit`, "1000");
    writeFileSync(`/proc/sys/net/ipv6/neigh/${device}/retrans_time_ms`, "100");
  });
}

function removeLeftovers(): void {
  if (!existsSync(namespaces)) return;
  for (const name of readdirSync(namespaces)) {
    const [, owner] = new RegExp(`^${prefix}-(\\d+)-`).exec(name) ?? [];
    if (owner === undefined || existsSync(`/proc/${owner}`)) continue;
    for (const pid of ip(`netns pids ${name}`).split("\n").filter(Boolean)) process.kill(Number(pid), "SIGKILL");
    remove(name);
  }
}

function remove(name: string): void {
  if (existsSync(`${namespaces}/${name}`)) ip(`netns del ${name}`);
  rmSync(`${resolvers}/${name}`, { recursive: true, force: true });
  if (existsSync(resolvers) && readdirSync(resolvers).length === 0) rmdirSync(resolvers);
}

function ip(command: string): string {
  return run(["ip", ...command.split(" ")], "");
}

function ipBatch(namespace: string, commands: string[]): void {
  run(["ip", "-n", namespace, "-batch", "-"], commands.join("\n"));
}

function run(command: string[], stdin: string): string {
  const { exitCode, stdout, stderr } = Bun.spawnSync(command, { stdin: Buffer.from(stdin) });
  if (exitCode !== 0) throw new Error(`${command.join(" ")}: ${stderr.toString().trim()}`);
  return stdout.toString();
}
