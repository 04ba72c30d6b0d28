// Compiles TollwayForwarder.sol with the pinned solc and prints TollwayForwarder.json.
//   node contracts_abi/forwarder/compile.mjs > contracts_abi/forwarder/TollwayForwarder.json
// No metadata hash and fixed settings: the same source gives the same bytes on every machine.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const solc = createRequire(import.meta.url)("solc");
const file = "TollwayForwarder.sol";
const settings = {
  evmVersion: "cancun",
  optimizer: { enabled: true, runs: 10_000 },
  metadata: { bytecodeHash: "none", appendCBOR: false },
  outputSelection: { "*": { "*": ["abi", "evm.bytecode.object", "evm.deployedBytecode.object"] } },
};
const content = readFileSync(new URL(file, import.meta.url), "utf8");
const output = JSON.parse(
  solc.compile(JSON.stringify({ language: "Solidity", sources: { [file]: { content } }, settings })),
);
const complaints = output.errors ?? [];
if (complaints.length > 0) {
  process.stderr.write(complaints.map((each) => each.formattedMessage).join("\n"));
  process.exit(1);
}
const contracts = {};
for (const name of ["Forwarder", "ForwarderFactory"]) {
  const compiled = output.contracts[file][name];
  contracts[name] = { abi: compiled.abi, bytecode: "0x" + compiled.evm.bytecode.object };
}
const { outputSelection, ...reproducible } = settings;
process.stdout.write(
  JSON.stringify({ compiler: solc.version(), settings: reproducible, contracts }, null, 1) + "\n",
);
