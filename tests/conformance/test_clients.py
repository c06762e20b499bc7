"""What real clients raise over real sockets, and what is made of it. Missing clients are skipped."""

import json
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

import anyio
import attrs
import pytest

from agentloop import Verdict, VerdictKind, classify
from agentloop._signs import is_sign_of_outage
from agentloop.contrib.dask._errors import pack_error, unpack_error

TRANSIENT, OVERLOAD, PERMANENT, FATAL = VerdictKind


@attrs.frozen
class Answer:
    """What a server answers, and what that means."""

    status: int
    verdict: Verdict
    headers: Mapping[str, str] = attrs.Factory(dict)
    name: str = ""
    """What the provider calls the error."""
    details: Sequence[Any] = ()


WAIT = {"Retry-After": "7"}
ANSWERS = {
    "throttled": Answer(429, Verdict(OVERLOAD)),
    "throttled with a wait": Answer(429, Verdict(OVERLOAD, 7), WAIT),
    "overloaded with a wait": Answer(503, Verdict(OVERLOAD, 7), WAIT),
    "server error": Answer(500, Verdict(TRANSIENT)),
    "bad key": Answer(401, Verdict(FATAL)),
    "bad request": Answer(400, Verdict(PERMANENT)),
    "not found": Answer(404, Verdict(PERMANENT)),
}
# What a provider says in a way of its own.
OWN_ANSWERS = {
    "openai": {"no quota": Answer(429, Verdict(FATAL), {"x-should-retry": "false"}, "insufficient_quota")},
    "anthropic": {"overloaded": Answer(529, Verdict(OVERLOAD), {}, "overloaded_error")},
    "botocore": {
        "no quota": Answer(400, Verdict(OVERLOAD), {}, "ThrottlingException"),
        "unknown key": Answer(403, Verdict(FATAL), {}, "UnrecognizedClientException"),
    },
}
RETRY_INFO = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "41s"}
for client in ("genai", "genai_async", "api_core"):
    answer = Answer(429, Verdict(OVERLOAD, 41), {}, "RESOURCE_EXHAUSTED", [RETRY_INFO])
    OWN_ANSWERS[client] = {"no quota": answer}


# --- servers


class Handler(BaseHTTPRequestHandler):
    """Answers as the path says: first the client whose provider this is, then the case."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        _, client, case, *_ = self.path.replace("%20", " ").split("/")
        if case == "hang":
            done.wait(5)
            self.close_connection = True
            return

        answer = answers(client)[case]
        body = json.dumps(body_of(client, answer)).encode()
        self.send_response(answer.status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **({"x-amzn-errortype": answer.name or "Whatever"} if client == "botocore" else {}),
            **answer.headers,
        }.items():
            self.send_header(name, value)

        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


done = Event()


def answers(client: str) -> dict[str, Answer]:
    return {**ANSWERS, **OWN_ANSWERS.get(client, {})}


def body_of(client: str, answer: Answer) -> Any:
    name = answer.name or "whatever"
    if client in ("genai", "genai_async", "api_core"):
        error = {"code": answer.status, "status": name, "message": "no", "details": answer.details}
        return {"error": error}

    if client == "botocore":
        return {"message": "no"}

    return {"type": "error", "error": {"type": name, "code": None, "message": "no"}}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    done.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        done.set()
        server.shutdown()
        thread.join()


# --- clients: each makes one call, without retries of its own, and gives up after a while


def httpx2(url: str, seconds: float) -> None:
    httpx2 = pytest.importorskip("httpx2")
    with httpx2.Client(trust_env=False, verify=False, timeout=seconds) as client:
        client.post(url).raise_for_status()


def openai(url: str, seconds: float) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=url, api_key="k", max_retries=0, timeout=seconds) as client:
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "?"}])


def anthropic(url: str, seconds: float) -> None:
    anthropic = pytest.importorskip("anthropic")
    with anthropic.Anthropic(base_url=url, api_key="k", max_retries=0, timeout=seconds) as client:
        client.messages.create(model="m", max_tokens=9, messages=[{"role": "user", "content": "?"}])


def aiohttp(url: str, seconds: float) -> None:
    aiohttp = pytest.importorskip("aiohttp")

    async def main() -> None:
        timeout = aiohttp.ClientTimeout(total=seconds)
        async with aiohttp.ClientSession(timeout=timeout) as session, session.post(url) as response:
            response.raise_for_status()

    anyio.run(main)


def botocore(url: str, seconds: float) -> None:
    pytest.importorskip("botocore")
    from botocore.config import Config
    from botocore.session import Session

    config = Config(
        retries={"total_max_attempts": 1}, connect_timeout=seconds, read_timeout=seconds, proxies={}
    )
    client = Session().create_client(
        "bedrock-runtime",
        region_name="eu-north-1",
        endpoint_url=url,
        aws_access_key_id="k",
        aws_secret_access_key="s",
        config=config,
    )
    try:
        client.converse(modelId="m", messages=[{"role": "user", "content": [{"text": "?"}]}])
    finally:
        client.close()


@contextmanager
def genai_client(url: str, seconds: float) -> Iterator[Any]:
    pytest.importorskip("google.genai")
    from google.genai import Client
    from google.genai.types import HttpOptions

    options = HttpOptions(base_url=url, api_version="v1", timeout=round(seconds * 1000))
    with Client(api_key="k", http_options=options) as client:
        yield client


def genai(url: str, seconds: float) -> None:
    with genai_client(url, seconds) as client:
        client.models.generate_content(model="m", contents="?")


def genai_async(url: str, seconds: float) -> None:
    async def main() -> None:
        with genai_client(url, seconds) as client:
            async with client.aio as aio:
                await aio.models.generate_content(model="m", contents="?")

    anyio.run(main)


def api_core(url: str, seconds: float) -> None:
    exceptions = pytest.importorskip("google.api_core.exceptions")
    requests = pytest.importorskip("requests")
    with requests.Session() as session:
        session.trust_env = False
        response = session.post(url, timeout=seconds)

    raise exceptions.from_http_response(response)


def azure(url: str, seconds: float) -> None:
    pytest.importorskip("azure.core")
    from azure.core import PipelineClient
    from azure.core.rest import HttpRequest

    with PipelineClient(url, policies=[]) as client:
        options: Any = {"connection_timeout": seconds, "read_timeout": seconds}
        client.send_request(HttpRequest("POST", url), **options).raise_for_status()


CLIENTS = [httpx2, openai, anthropic, aiohttp, botocore, genai, genai_async, api_core, azure]
Client = Callable[[str, float], None]
# google-genai makes a subclass of a session of aiohttp's as it is imported, which aiohttp warns of.
pytestmark = pytest.mark.filterwarnings("ignore:Inheritance class AiohttpClientSession:DeprecationWarning")


def failure(client: Client, url: str, seconds: float = 5) -> Exception:
    with pytest.raises(Exception) as caught:
        client(url, seconds)

    exc = caught.value
    # From another process too, where few of these errors can be unpickled.
    travelled = unpack_error(pack_error(exc, "another process"))
    assert judged(travelled) == judged(exc)
    return exc


def judged(exc: BaseException) -> tuple[Verdict, bool]:
    assert isinstance(exc, Exception)
    return classify(exc), is_sign_of_outage(exc)


@pytest.mark.parametrize(
    ("client", "case"), [(client, case) for client in CLIENTS for case in answers(client.__name__)]
)
def test_answer_to_a_client_is_judged_for_what_it_is(client: Client, case: str, address: str) -> None:
    answer = answers(client.__name__)[case]
    exc = failure(client, f"http://{address}/{client.__name__}/{case}")
    assert classify(exc) == answer.verdict
    assert is_sign_of_outage(exc) == (answer.status >= 500)


@contextmanager
def port_that_refuses() -> Iterator[str]:
    with socket.socket() as nobody:  # has a port, so that nobody else gets it, and does not listen
        nobody.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{nobody.getsockname()[1]}"


# The async client of google-genai tries again after up to ten seconds when there is no connection.
@pytest.mark.parametrize("client", [client for client in CLIENTS if client is not genai_async])
@pytest.mark.parametrize("case", ["refused", "unknown name", "time-out"])
def test_client_that_gets_no_answer_speaks_of_the_provider(client: Client, case: str, address: str) -> None:
    with port_that_refuses() as refusing:
        host = {"refused": refusing, "unknown name": "nobody.invalid:80", "time-out": address}[case]
        exc = failure(client, f"http://{host}/{client.__name__}/hang", 0.2 if case == "time-out" else 5)

    assert classify(exc) == Verdict(TRANSIENT)
    assert is_sign_of_outage(exc)


def test_what_tenacity_gave_up_after_is_judged(address: str) -> None:
    tenacity = pytest.importorskip("tenacity")
    call = tenacity.retry(stop=tenacity.stop_after_attempt(2))(httpx2)
    exc = failure(call, f"http://{address}/httpx2/throttled with a wait")
    assert isinstance(exc, tenacity.RetryError)
    assert classify(exc) == Verdict(OVERLOAD, 7)
    exc.__cause__ = None
    assert classify(exc) == Verdict(OVERLOAD, 7)


# --- gRPC

RPC_ANSWERS: dict[str, tuple[Verdict, bool]] = {
    "RESOURCE_EXHAUSTED": (Verdict(OVERLOAD), False),
    "UNAVAILABLE": (Verdict(TRANSIENT), True),
    "INTERNAL": (Verdict(TRANSIENT), True),
    "UNAUTHENTICATED": (Verdict(FATAL), False),
    "INVALID_ARGUMENT": (Verdict(PERMANENT), False),
    "NOT_FOUND": (Verdict(PERMANENT), False),
    "refused": (Verdict(TRANSIENT), True),
    "unknown name": (Verdict(TRANSIENT), True),
    "time-out": (Verdict(TRANSIENT), True),
}


def status_without_quota() -> Any:
    from google.protobuf.any_pb2 import Any as AnyMessage
    from google.protobuf.duration_pb2 import Duration
    from google.rpc.error_details_pb2 import RetryInfo
    from google.rpc.status_pb2 import Status
    from grpc_status import rpc_status

    details = AnyMessage()
    details.Pack(RetryInfo(retry_delay=Duration(seconds=41, nanos=500_000_000)))
    return rpc_status.to_status(Status(code=8, message="no", details=[details]))


async def call_grpc(case: str, wrap: Callable[[Any], Any]) -> None:
    """Have a server answer one call with the status that a case names."""
    import grpc

    async def answer(request: bytes, context: Any) -> bytes:
        if case == "time-out":
            await anyio.sleep_forever()

        if case == "no quota":
            await context.abort_with_status(status_without_quota())

        await context.abort(grpc.StatusCode[case], "no")

    handlers = {"Call": grpc.unary_unary_rpc_method_handler(answer)}
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Service", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        with port_that_refuses() as refusing:
            target = {"refused": refusing, "unknown name": "nobody.invalid:80"}.get(case, f"127.0.0.1:{port}")
            async with grpc.aio.insecure_channel(target) as channel:
                await wrap(channel.unary_unary("/Service/Call"))(
                    b"", timeout=0.2 if case == "time-out" else 5
                )
    finally:
        await server.stop(None)


@pytest.mark.parametrize("case", RPC_ANSWERS)
def test_failure_of_grpc_is_judged_for_what_it_is(case: str) -> None:
    pytest.importorskip("grpc")
    exc = failure(lambda *_: anyio.run(call_grpc, case, lambda call: call), "")
    assert (classify(exc), is_sign_of_outage(exc)) == RPC_ANSWERS[case]


@pytest.mark.parametrize("case", [*RPC_ANSWERS, "no quota"])
def test_failure_of_grpc_through_google_api_core_is_judged_for_what_it_is(case: str) -> None:
    pytest.importorskip("grpc_status")
    helpers = pytest.importorskip("google.api_core.grpc_helpers_async")
    exc = failure(lambda *_: anyio.run(call_grpc, case, helpers.wrap_errors), "")
    answer = RPC_ANSWERS.get(case, (Verdict(OVERLOAD, 41.5), False))
    assert (classify(exc), is_sign_of_outage(exc)) == answer
