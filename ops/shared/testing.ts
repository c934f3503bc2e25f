export * from "./client.ts";
export * from "./relay.ts";
