// The smallest function: an HTTP server on PORT that sees the path without /functions/NAME.
const http = require('http');

http
  .createServer((request, response) => {
    const who = decodeURIComponent(new URL(request.url, 'http://function').pathname.slice(1)) || 'world';
    response.end(`hello ${who}, from Node.js ${process.version}\n`);
  })
  .listen(process.env.PORT);
