"""A small Flask app."""

import os

from flask import Flask, jsonify

app = Flask(__name__)


@app.get("/")
def index():
    return jsonify(greeting=os.environ.get("GREETING", "Hello from Flask"))
