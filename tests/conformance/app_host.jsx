// A host whose view of MCP Apps is that of @mcp-ui/client, as hosts built on it have it.
import { createElement } from "react";
import { createRoot } from "react-dom/client";
import { AppRenderer } from "@mcp-ui/client";
import { Client } from "@modelcontextprotocol/sdk/client/index.js";
import { StreamableHTTPClientTransport } from "@modelcontextprotocol/sdk/client/streamableHttp.js";

let client, root;
window.problems = [];

window.reach = async (url) => {
  client = new Client({ name: "host", version: "1" });
  await client.connect(new StreamableHTTPClientTransport(new URL(url)));
};

window.show = async (toolName, toolInput, sandbox, theme) => {
  const toolResult = await client.callTool({ name: toolName, arguments: toolInput });
  if (root) root.unmount();
  root = createRoot(document.getElementById("root"));
  root.render(createElement(AppRenderer, {
    client, toolName, toolInput, toolResult,
    sandbox: { url: new URL(sandbox) },
    hostContext: { theme },
    onError: (error) => window.problems.push(String(error)),
    onSizeChanged: (size) => { window.size = size; },
  }));
};
