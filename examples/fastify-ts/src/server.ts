import Fastify from "fastify";

const app = Fastify({ logger: true });
const greeting: string = process.env.GREETING ?? "Hello from Fastify";

app.get("/", async () => ({ greeting }));

app.get<{ Params: { name: string } }>("/greet/:name", async (request) => ({
  greeting: `${greeting}, ${request.params.name}`,
}));

await app.listen({ port: Number(process.env.PORT ?? 3000) });

process.on("SIGTERM", () => {
  app.close().then(() => process.exit(0));
});
