//! The HTTP front end: a reverse proxy for the `OpenAI` API that decides for every request where it
//! goes.
//!
//! Bodies of answers pass through untouched, chunk by chunk. A request is tried again elsewhere
//! only as long as the client has no byte of an answer: where no connection could be made, and
//! once, within a budget, where the engine broke off or answered 502 or 503. When a client goes
//! away its request upstream is dropped, which cancels it there.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request as Incoming, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use tokio::time::{Instant, Sleep};

use super::answer::Tail;
use super::booking::Verdict;
use super::outcome::Outcome;
use super::request::{Kind, Refusal, Request};
use super::router::Router;
use super::source::SOURCE;
use super::ticket::Ticket;
use super::traces;
use super::two_steps::{self, PrefillBy};
use super::urgency::Urgency;
use kvcellar_index::api::paced::TooSlow;

/// Bounds of the front end.
#[derive(Debug, Clone)]
pub struct ProxyLimits {
    /// Bytes of a body.
    pub body_bytes_max: usize,
    /// How long an engine may send nothing: before its first byte, and between two.
    pub silence: Duration,
    /// Engines that a request may try.
    pub tries: usize,
    /// Header that names a session.
    pub session_header: HeaderName,
}

/// What handlers share.
#[derive(Debug)]
pub struct Proxy {
    router: Arc<Router>,
    limits: ProxyLimits,
}

/// Headers that belong to one connection.
const HOP_BY_HOP: [HeaderName; 8] = [
    header::CONNECTION,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    HeaderName::from_static("keep-alive"),
];

/// Asks for the decision in the answer's headers.
pub const DEBUG: HeaderName = HeaderName::from_static("x-kvcellar-debug");

/// Names an engine's data-parallel rank.
pub const RANK: &str = "x-data-parallel-rank";

/// Says by how many ms an answer's head came later than it was wanted.
pub const LATE: &str = "x-kvcellar-late-ms";

/// The routes.
pub fn routes(router: Arc<Router>, limits: ProxyLimits) -> axum::Router {
    let proxy = Arc::new(Proxy { router, limits });
    axum::Router::new().fallback(pass).with_state(proxy)
}

fn refuse(refusal: &Refusal) -> Response {
    let status = StatusCode::from_u16(refusal.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = (status, refusal.body()).into_response();
    for (name, value) in refusal.headers() {
        response.headers_mut().insert(HeaderName::from_static(name), HeaderValue::from_static(value));
    }
    response
}

async fn pass(State(proxy): State<Arc<Proxy>>, incoming: Incoming) -> Response {
    match proxy.pass(incoming).await {
        Ok(response) => response,
        Err(refusal) => refuse(&refusal),
    }
}

impl Proxy {
    async fn pass(&self, incoming: Incoming) -> Result<Response, Refusal> {
        let (parts, body) = incoming.into_parts();
        let body = self.read(body).await.inspect_err(|refusal| self.router.metrics.refused(refusal.name()))?;
        let kind = if parts.method == Method::POST { Kind::of(parts.uri.path()) } else { Kind::Other };
        if parts.method == Method::GET
            && parts.uri.path() == "/v1/models"
            && let Some(response) = self.models()
        {
            return Ok(response);
        }
        let request = self.request(kind, &parts, &body)?;
        let body = request.raw.clone();
        let mut ticket = self.router.route(&request).await?;
        drop(request);
        // With what another engine has computed, if it has.
        let (mut body, whole) = (body.clone(), body);
        if self.router.setup.two_steps.by == PrefillBy::Router && ticket.prefill().is_some() {
            let step = self.prefill(&parts.uri, &parts.headers, &body, &ticket).await;
            let verdict = match step {
                FirstStep::Done(_) => Verdict::Well,
                FirstStep::Refused => Verdict::Unsaid,
                FirstStep::Failed => Verdict::Ill,
            };
            ticket.prefilled(matches!(step, FirstStep::Done(_)), verdict);
            if let FirstStep::Done(second) = step {
                body = second;
            }
        }
        let debug = parts.headers.contains_key(&DEBUG);
        let mut tries_left = self.limits.tries;
        // An engine that got the request may have worked on it, or died of it: that is tried once.
        let mut may_repeat = true;
        loop {
            tries_left = tries_left.saturating_sub(1);
            let upstream = Self::upstream(&parts.method, &parts.uri, &parts.headers, &body, &ticket)?;
            let name = ticket.engine().spec.name.clone();
            let mut move_on = |ticket: &mut Ticket, body: &mut Bytes, was_sent: bool| {
                let may =
                    tries_left > 0 && (!was_sent || std::mem::take(&mut may_repeat) && self.router.retries.spend());
                if may && was_sent {
                    // What was handed over may have been fetched, and be another prompt's by now.
                    ticket.forget_prefill();
                    body.clone_from(&whole);
                }
                may && ticket.move_on()
            };
            match tokio::time::timeout(self.limits.silence, self.router.upstream.pass(upstream)).await {
                Ok(Ok(response)) => {
                    let status = response.status();
                    ticket.judge(judged_by(status));
                    if may_be_repeated(status) && move_on(&mut ticket, &mut body, true) {
                        log::warn!("{name}: it answered {status}: trying another engine");
                        continue;
                    }
                    return Ok(self.answer(response, ticket, debug));
                }
                Ok(Err(error)) => {
                    ticket.judge(Verdict::Ill);
                    if error.is_connect() {
                        ticket.engine().refused();
                    }
                    if !move_on(&mut ticket, &mut body, !error.is_connect()) {
                        log::warn!("{name}: {error}: no other engine is tried");
                        ticket.end(Outcome::Failed, None);
                        return Err(Refusal::Upstream(format!("{name}: {error}")));
                    }
                    log::warn!("{name}: {error}: trying another engine");
                }
                Err(_) => {
                    ticket.end(Outcome::Timeout, None);
                    return Err(Refusal::Timeout(self.limits.silence.as_secs()));
                }
            }
        }
    }

    /// Reads a request.
    fn request(&self, kind: Kind, parts: &Parts, body: &Bytes) -> Result<Request, Refusal> {
        let refused = |refusal: &Refusal| self.router.metrics.refused(refusal.name());
        let climbs = |part: &str| matches!(part.to_ascii_lowercase().replace("%2e", ".").as_str(), "." | "..");
        if !parts.uri.path().starts_with('/') {
            // Behind an engine's address it would be another address.
            let problem = format!("the target of the request, `{}`, is no path", parts.uri);
            return Err(Refusal::BadRequest(problem)).inspect_err(refused);
        }
        if parts.uri.path().split('/').any(climbs) {
            // Below an engine's path it would lead to somebody else's.
            return Err(Refusal::BadRequest("the path goes up".to_owned())).inspect_err(refused);
        }
        let mut request = Request::read(kind, body.clone()).inspect_err(refused)?;
        let header = |name: &str| parts.headers.get(name).and_then(|value| value.to_str().ok());
        request.session = header(self.limits.session_header.as_str()).map(str::to_owned);
        request.urgency = Urgency::read(header, &self.router.setup.objectives);
        let traced = |name: &str| Some((name.to_owned(), header(name)?.to_owned()));
        request.trace.extend(traces::HEADERS.iter().filter_map(|name| traced(name)));
        request.may_split = true;
        self.router.resolve(&mut request);
        Ok(request)
    }

    /// Has a prompt computed where the ticket says.
    async fn prefill(&self, uri: &Uri, headers: &HeaderMap, body: &Bytes, ticket: &Ticket) -> FirstStep {
        let Some((engine, first)) = ticket.prefill().zip(two_steps::first(body)) else { return FirstStep::Refused };
        let path = uri.path_and_query().map_or("/", |it| it.as_str());
        let asked = hyper::Request::post(format!("{}{path}", engine.spec.url)).body(Full::new(Bytes::from(first)));
        let Ok(mut asked) = asked else { return FirstStep::Refused };
        for (name, value) in headers.iter().filter(|(name, _)| goes_on(name, headers)) {
            asked.headers_mut().append(name, value.clone());
        }
        let answered = async {
            let response = self.router.upstream.pass(asked).await.ok()?;
            let status = response.status();
            let answer = Limited::new(response.into_body(), self.limits.body_bytes_max).collect().await.ok()?;
            Some((status, answer.to_bytes()))
        };
        let name = &engine.spec.name;
        match tokio::time::timeout(self.limits.silence, answered).await {
            Ok(Some((status, answer))) if status.is_success() => {
                if let Some(body) = two_steps::second(body, &answer) {
                    return FirstStep::Done(body.into());
                }
                log::warn!("{name}: it handed no KV over: does it have a connector that does, e.g. NixlConnector?");
                FirstStep::Refused
            }
            Ok(Some((status, _))) if judged_by(status) != Verdict::Ill => FirstStep::Refused,
            _ => {
                log::warn!("{name}: a prompt was not computed for another engine, which computes it itself");
                FirstStep::Failed
            }
        }
    }

    async fn read(&self, body: Body) -> Result<Bytes, Refusal> {
        let most = self.limits.body_bytes_max;
        match Limited::new(body, most).collect().await {
            Ok(collected) => Ok(collected.to_bytes()),
            Err(error) if error.is::<LengthLimitError>() => Err(Refusal::TooLarge(most)),
            Err(error) if is_too_slow(&*error) => Err(Refusal::SlowBody),
            Err(error) => Err(Refusal::BadRequest(format!("the body could not be read: {error}"))),
        }
    }

    /// All models of engines that serve different ones; `None`: any engine's answer does.
    fn models(&self) -> Option<Response> {
        let all = self.router.engines.all();
        let lists: Vec<_> =
            all.iter().filter(|engine| engine.is_usable()).map(|engine| engine.models.load_full()).collect();
        let aliases = &self.router.setup.aliases;
        if lists.windows(2).all(|pair| pair[0] == pair[1]) && aliases.is_empty() {
            return None;
        }
        let mut models: Vec<_> = lists.iter().flat_map(|list| list.iter()).collect();
        models.sort_by(|a, b| a.id.cmp(&b.id));
        models.dedup();
        let row = |model: &&super::engine::Model| serde_json::json!({"id": model.id, "object": "model", "owned_by": "vllm", "parent": model.parent});
        let is_served = |model: &str| models.iter().any(|it| it.id == model);
        let named =
            aliases.iter().filter_map(|(name, mut stands_for)| Some((name, stands_for.find(|it| is_served(it))?)));
        let named = named.map(|(name, model)| serde_json::json!({"id": name, "object": "model", "owned_by": "vllm", "parent": null, "root": model}));
        let list: Vec<_> = models.iter().map(row).chain(named).collect();
        Some(axum::Json(serde_json::json!({"object": "list", "data": list})).into_response())
    }

    fn upstream(
        method: &Method,
        uri: &Uri,
        headers: &HeaderMap,
        body: &Bytes,
        ticket: &Ticket,
    ) -> Result<hyper::Request<Full<Bytes>>, Refusal> {
        let path = uri.path_and_query().map_or("/", |it| it.as_str());
        let target = format!("{}{path}", ticket.engine().spec.url);
        let mut request =
            hyper::Request::builder().method(method).uri(target).body(Full::new(ticket.body(body.clone())));
        if let Ok(request) = &mut request {
            for (name, value) in headers.iter().filter(|(name, _)| goes_on(name, headers)) {
                request.headers_mut().append(name, value.clone());
            }
            // Where this router sends the first step it is over by now.
            if let Some(place) = ticket.prefill().and_then(|engine| HeaderValue::from_str(engine.spec.authority()).ok())
            {
                request.headers_mut().insert(two_steps::PREFILLER, place);
            }
            if let Some((name, place)) = ticket.source_header()
                && let Ok(place) = HeaderValue::from_str(place)
            {
                request.headers_mut().insert(name, place);
            }
            if let Some(rank) = ticket.rank() {
                request.headers_mut().insert(RANK, rank.into());
            }
            for (name, value) in ticket.trace_headers() {
                if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::from_str(value)) {
                    request.headers_mut().insert(name, value);
                }
            }
        }
        request.map_err(|error| Refusal::BadRequest(error.to_string()))
    }

    fn answer(&self, response: hyper::Response<hyper::body::Incoming>, ticket: Ticket, debug: bool) -> Response {
        let (parts, body) = response.into_parts();
        let mut out = Response::new(Body::empty());
        *out.status_mut() = parts.status;
        for (name, value) in parts.headers.iter().filter(|(name, _)| passes(name, &parts.headers)) {
            out.headers_mut().append(name, value.clone());
        }
        if debug {
            let shown =
                serde_json::to_string(ticket.decision()).ok().and_then(|text| HeaderValue::from_str(&text).ok());
            out.headers_mut().insert("x-kvcellar-decision", shown.unwrap_or(HeaderValue::from_static("{}")));
            if let Ok(name) = HeaderValue::from_str(&ticket.engine().spec.name) {
                out.headers_mut().insert("x-kvcellar-engine", name);
            }
        }
        if let Some(late) = ticket.late_by() {
            out.headers_mut().insert(LATE, (late.as_millis() as u64).into());
        }
        let outcome = if parts.status.is_server_error() { Outcome::EngineError } else { Outcome::Done };
        let silence = self.limits.silence;
        let observed = Observed {
            inner: body,
            ticket: Some(ticket),
            tail: Tail::default(),
            outcome,
            silence,
            alarm: Box::pin(tokio::time::sleep(silence)),
        };
        *out.body_mut() = Body::new(observed);
        out
    }
}

/// A body was not waited for any longer.
fn is_too_slow(error: &(dyn std::error::Error + 'static)) -> bool {
    error.is::<TooSlow>() || error.source().is_some_and(is_too_slow)
}

/// What a status says of the engine, or of what is in front of it. A 500 may be the request's own
/// doing, and one client must not be able to close a fleet; nor is it a sign of health.
pub fn judged_by(status: StatusCode) -> Verdict {
    match status {
        StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT => Verdict::Ill,
        status if status.is_server_error() => Verdict::Unsaid,
        _ => Verdict::Well,
    }
}

/// The status says that nothing was computed: another engine may do it at no loss.
fn may_be_repeated(status: StatusCode) -> bool {
    matches!(status, StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE)
}

/// What became of a prompt that was to be computed by another engine.
enum FirstStep {
    /// It was: the body with which the next engine goes on.
    Done(Bytes),
    /// The engine would not, or could not: that says nothing of its health.
    Refused,
    /// Something is wrong with the engine.
    Failed,
}

/// A client's header goes on to an engine. Where a prompt is computed or fetched from, and by which
/// rank, is not the client's to say.
fn goes_on(name: &HeaderName, headers: &HeaderMap) -> bool {
    let is_ours = [two_steps::PREFILLER, RANK, SOURCE].iter().any(|ours| name == ours);
    passes(name, headers) && !is_ours && *name != header::HOST && *name != header::CONTENT_LENGTH
}

fn passes(name: &HeaderName, headers: &HeaderMap) -> bool {
    let named = headers.get(header::CONNECTION).and_then(|value| value.to_str().ok()).unwrap_or_default();
    !HOP_BY_HOP.contains(name) && !named.split(',').any(|it| it.trim().eq_ignore_ascii_case(name.as_str()))
}

/// An answer's body on its way, watched but not changed. Dropped before its end, it cancels the
/// request upstream.
struct Observed {
    inner: hyper::body::Incoming,
    ticket: Option<Ticket>,
    tail: Tail,
    outcome: Outcome,
    silence: Duration,
    alarm: Pin<Box<Sleep>>,
}

impl http_body::Body for Observed {
    type Data = Bytes;
    type Error = axum::BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::BoxError>>> {
        let this = &mut *self;
        match Pin::new(&mut this.inner).poll_frame(context) {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(bytes) = frame.data_ref() {
                    this.tail.push(bytes);
                    this.ticket.iter().for_each(Ticket::answered);
                    this.alarm.as_mut().reset(Instant::now() + this.silence);
                }
                if this.inner.is_end_stream() {
                    this.end(this.outcome);
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => {
                this.end(Outcome::Broken);
                Poll::Ready(Some(Err(error.into())))
            }
            Poll::Ready(None) => {
                this.end(this.outcome);
                Poll::Ready(None)
            }
            Poll::Pending => match this.alarm.as_mut().poll(context) {
                Poll::Ready(()) => {
                    this.end(Outcome::Timeout);
                    Poll::Ready(Some(Err("the engine fell silent".into())))
                }
                Poll::Pending => Poll::Pending,
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl Observed {
    fn end(&mut self, outcome: Outcome) {
        if let Some(ticket) = self.ticket.take() {
            ticket.end(outcome, self.tail.usage());
        }
    }
}

impl Drop for Observed {
    fn drop(&mut self) {
        // With a known length the server may not ask for the end.
        if self.inner.is_end_stream() {
            self.end(self.outcome);
        }
    }
}
