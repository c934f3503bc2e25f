/** A systemd of the test's own: one in a container, with this machine's programs and an `/etc` that knows nothing else. */
import { copyFile, mkdir } from "node:fs/promises";
import { join } from "node:path";
import { ROOT } from "../shared/processes.ts";
import { until } from "../shared/wait.ts";
import { Engine, rootOfPrograms, whyNoEngine } from "./engine.ts";

const SYSTEMD = "/usr/lib/systemd/systemd";

/** Why tests with systemd skip; undefined if they can run. */
export const whyNoSystemd = whyNoEngine ?? ((await Bun.file(SYSTEMD).exists()) ? undefined : " (skipped: without systemd)");

/** What systemd itself needs: its own mounts, and to look into the processes that it starts. */
const RIGHTS = ["--systemd=always", "--cap-add=sys_admin,sys_ptrace", "--security-opt=seccomp=unconfined"];

/** The unit, with Bun where it is in these containers: `/usr` is this machine's, and stays as it is. */
export const unit = (await Bun.file(join(import.meta.dir, "party-sockets.service")).text()).replaceAll(
  "/usr/local/bin/bun",
  "/opt/bun",
);

/** A systemd that is up, on a machine where Bun and the relay are installed. */
export class Systemd implements AsyncDisposable {
  private constructor(
    private readonly engine: Engine,
    /** Where its `/` is. */
    readonly root: string,
  ) {}

  /** @param files what its file system has beside, by their paths @param options podman's */
  static async open(files: Record<string, string>, ...options: string[]): Promise<Systemd> {
    const engine = await Engine.open();
    const systemd = new Systemd(engine, join(engine.home, "root"));
    const { root } = systemd;
    const programs = await rootOfPrograms(root);
    const all = {
      "/etc/passwd": "root:x:0:0::/root:/bin/sh\n",
      "/etc/machine-id": `${"0123456789abcdef".repeat(2)}\n`, // else it is a first boot, which enables all units
      ...files,
    };
    for (const [path, content] of Object.entries(all)) await Bun.write(join(root, path), content);
    await copyFile(process.execPath, join(root, "opt/bun"));
    await mkdir(join(root, "opt/party-sockets"));
    for (const name of ["regions.ts", "server.ts"]) await copyFile(join(ROOT, name), join(root, "opt/party-sockets", name));
    engine.start("systemd", ...RIGHTS, ...options, ...programs, SYSTEMD, "--unit=basic.target");
    await until("systemd to be up", async () => (await systemd.systemctl("is-system-running").catch(() => "")) === "running");
    return systemd;
  }

  /** Runs a command inside. @returns what it printed @throws Failed */
  exec(...command: string[]): Promise<string> {
    return this.engine.podman("exec", "systemd", ...command);
  }

  systemctl(...command: string[]): Promise<string> {
    return this.exec("systemctl", ...command);
  }

  /** A property of a unit. */
  property(unit: string, name: string): Promise<string> {
    return this.systemctl("show", `--property=${name}`, "--value", unit);
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.engine[Symbol.asyncDispose]();
  }
}
