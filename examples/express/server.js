const express = require("express");

const app = express();
const greeting = process.env.GREETING || "Hello from Express";

app.get("/", (request, response) => {
  response.send(`${greeting}\n`);
});

app.get("/healthz", (request, response) => response.json({ ok: true }));

const server = app.listen(process.env.PORT || 3000, () => {
  console.log(`listening on ${server.address().port}`);
});

process.on("SIGTERM", () => server.close(() => process.exit(0)));
