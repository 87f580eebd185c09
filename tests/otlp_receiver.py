"""A collector in this process, over HTTP or gRPC, that keeps what it is sent, or fails in one of the ways collectors fail."""

import gzip
import socket
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics_pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace_pb

REQUESTS = {"metrics": metrics_pb.ExportMetricsServiceRequest, "traces": trace_pb.ExportTraceServiceRequest}
ANSWERS = {"metrics": metrics_pb.ExportMetricsServiceResponse, "traces": trace_pb.ExportTraceServiceResponse}
SERVICES = {"metrics": "opentelemetry.proto.collector.metrics.v1.MetricsService", "traces": "opentelemetry.proto.collector.trace.v1.TraceService"}


class Point(NamedTuple):
    """A data point: of a gauge or sum its value; of a histogram (bounds, counts, sum)."""

    name: str
    unit: str
    kind: str
    attributes: dict
    time_ns: int
    value: float | tuple


class Receiver:
    """fault: "" keeps everything; "500" refuses each request; "slow" takes 0.3 s over each; "hang" never answers; "dies" is gone
    after two. Use as a context manager."""

    def __init__(self, protocol: str = "http/protobuf", fault: str = ""):
        self.protocol, self.fault = protocol, fault
        self.requests: dict[str, list] = {"metrics": [], "traces": []}
        self.headers: list[dict] = []
        self.arrived = 0  # requests, answered or not
        self._release = threading.Event()
        self._serve = _serve_grpc if protocol == "grpc" else _serve_http

    def __enter__(self) -> "Receiver":
        self.port, self._stop = self._serve(self)
        return self

    def __exit__(self, *exception) -> None:
        self._release.set()
        self._stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": self.url, "OTEL_EXPORTER_OTLP_PROTOCOL": self.protocol}

    def take(self, signal: str, body: bytes, headers: dict) -> bytes | None:
        """The answer to a request; None: refused."""
        self.arrived += 1
        if self.fault == "hang":
            self._release.wait()
        if self.fault == "dies" and self.arrived == 2:
            threading.Thread(target=self._stop).start()
        if self.fault == "slow":
            time.sleep(0.3)
        if self.fault in ("500", "hang"):
            return None
        self.requests[signal].append(REQUESTS[signal].FromString(body))
        self.headers.append(headers)
        return ANSWERS[signal]().SerializeToString()

    def resources(self) -> list[dict]:
        return [_attributes(r.resource.attributes) for q in self.requests["metrics"] for r in q.resource_metrics] + [
            _attributes(r.resource.attributes) for q in self.requests["traces"] for r in q.resource_spans]  # fmt: skip

    def points(self) -> list[Point]:
        """Every data point, as it came."""
        found = []
        for metric in (m for q in self.requests["metrics"] for r in q.resource_metrics for s in r.scope_metrics for m in s.metrics):
            kind = metric.WhichOneof("data")
            for p in getattr(metric, kind).data_points:
                value = (tuple(p.explicit_bounds), tuple(p.bucket_counts), p.sum) if kind == "histogram" else p.as_double
                found.append(Point(metric.name, metric.unit, kind, _attributes(p.attributes), p.time_unix_nano, value))
        return found

    def spans(self) -> list:
        return [s for q in self.requests["traces"] for r in q.resource_spans for scope in r.scope_spans for s in scope.spans]


def _attributes(pairs) -> dict:
    return {p.key: getattr(p.value, p.value.WhichOneof("value")) for p in pairs}


def _serve_http(receiver: Receiver):
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            unpack = {"gzip": gzip.decompress, "deflate": zlib.decompress}.get(self.headers.get("content-encoding", ""), bytes)
            answer = receiver.take(self.path.rpartition("/")[2], unpack(body), {k.lower(): v for k, v in self.headers.items()})
            self.send_response(200 if answer is not None else 500)
            self.send_header("Content-Length", str(len(answer or b"")))
            self.end_headers()
            self.wfile.write(answer or b"")

        def log_message(self, *args):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request, client_address):  # a client that has left while it was kept waiting
            pass

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server.server_address[1], lambda: (server.shutdown(), server.server_close())


def _serve_grpc(receiver: Receiver):
    def method(signal: str):
        def export(body: bytes, context) -> bytes:
            answer = receiver.take(signal, body, dict(context.invocation_metadata()))
            return answer if answer is not None else context.abort(grpc.StatusCode.INTERNAL, "planted")

        return grpc.method_handlers_generic_handler(SERVICES[signal], {"Export": grpc.unary_unary_rpc_method_handler(export)})

    server = grpc.server(ThreadPoolExecutor(8), handlers=[method("metrics"), method("traces")])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return port, lambda: server.stop(0)


def unused_port() -> int:
    """One that refuses connections."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
