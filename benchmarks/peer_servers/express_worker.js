// One org's worker: Express. It prints its port.
const express = require('express');

const org = process.argv[2];
const app = express();
app.disable('x-powered-by');
app.use(express.json());
app.post('/echo', (request, response) => response.json({ org, query: request.query, body: request.body }));
const server = app.listen(0, '127.0.0.1', () => console.log(server.address().port));
