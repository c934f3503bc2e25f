/** Command lines of the tools. */
import { parseArgs, type ParseArgsOptionsConfig } from "node:util";

/**
 * The flags that were given. Ends the process with 2, and says how the tool is used, if one is unknown; with 0 at
 * `--help`.
 */
export function readFlags<T extends ParseArgsOptionsConfig>(usage: string, options: T) {
  if (Bun.argv.includes("--help")) {
    console.log(`usage: ${usage}`);
    process.exit(0);
  }
  try {
    return parseArgs({ options }).values;
  } catch (error) {
    return badUsage(usage, (error as Error).message);
  }
}

/** Says what is wrong and how the tool is used, and ends the process with 2. */
export function badUsage(usage: string, fault: string): never {
  console.error(`${fault}\nusage: ${usage}`);
  process.exit(2);
}
