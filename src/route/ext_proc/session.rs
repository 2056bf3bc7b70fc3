//! One request's conversation with Envoy: messages in, answers out.

use std::collections::HashMap;
use std::sync::Arc;

use axum::http::StatusCode;
use bytes::Bytes;
use envoy_types::pb::envoy::config::core::v3::header_value_option::HeaderAppendAction;
use envoy_types::pb::envoy::config::core::v3::{HeaderMap, HeaderValue, HeaderValueOption, Metadata};
use envoy_types::pb::envoy::extensions::filters::http::ext_proc::v3::processing_mode::BodySendMode;
use envoy_types::pb::envoy::service::ext_proc::v3::body_mutation::Mutation;
use envoy_types::pb::envoy::service::ext_proc::v3::processing_request::Request as Message;
use envoy_types::pb::envoy::service::ext_proc::v3::processing_response::Response as Answer;
use envoy_types::pb::envoy::service::ext_proc::v3::{
    BodyMutation, BodyResponse, CommonResponse, HeaderMutation, HeadersResponse, HttpBody, HttpHeaders,
    ImmediateResponse, ProcessingRequest, ProcessingResponse, StreamedBodyResponse, TrailersResponse,
};
use envoy_types::pb::envoy::r#type::v3::HttpStatus;
use envoy_types::pb::google::protobuf::Struct;

use super::PickerLimits;
use super::metadata::{self, DESTINATION, SERVED, SUBSET};
use crate::answer::Tail;
use crate::engine::Engine;
use crate::outcome::Outcome;
use crate::proxy::{LATE, RANK, judged_by};
use crate::request::{Kind, Refusal, Request};
use crate::router::Router;
use crate::source::SOURCE;
use crate::ticket::Ticket;
use crate::traces;
use crate::two_steps::{PREFILLER, PrefillBy};
use crate::urgency::Urgency;

/// Envoy takes no larger pieces of a streamed body.
const CHUNK_BYTES: usize = 62_000;

/// A request's state: headers, then body, then the answer's headers and body, then over.
#[derive(Debug)]
pub(super) struct PickerSession {
    router: Arc<Router>,
    limits: Arc<PickerLimits>,
    request_mode: BodySendMode,
    response_mode: BodySendMode,
    kind: Kind,
    follows: Option<String>,
    subset: Option<Vec<String>>,
    trace: HashMap<String, String>,
    debug: bool,
    urgency: Urgency,
    body: Vec<u8>,
    ticket: Option<Ticket>,
    tail: Tail,
    failed: bool,
    over: bool,
}

impl PickerSession {
    pub(super) fn new(router: Arc<Router>, limits: Arc<PickerLimits>) -> Self {
        Self {
            router,
            limits,
            request_mode: BodySendMode::FullDuplexStreamed,
            response_mode: BodySendMode::FullDuplexStreamed,
            kind: Kind::Other,
            follows: None,
            subset: None,
            trace: HashMap::new(),
            debug: false,
            urgency: Urgency::default(),
            body: Vec::new(),
            ticket: None,
            tail: Tail::default(),
            failed: false,
            over: false,
        }
    }

    /// Nothing more will be answered.
    pub(super) fn is_over(&self) -> bool {
        self.over
    }

    /// A message, and what is to be answered.
    pub(super) async fn take(&mut self, message: ProcessingRequest) -> Vec<ProcessingResponse> {
        if let Some(config) = &message.protocol_config {
            self.request_mode = BodySendMode::try_from(config.request_body_mode).unwrap_or(self.request_mode);
            self.response_mode = BodySendMode::try_from(config.response_body_mode).unwrap_or(self.response_mode);
        }
        let metadata = message.metadata_context;
        match message.request {
            Some(Message::RequestHeaders(headers)) => self.request_headers(&headers, metadata.as_ref()).await,
            Some(Message::RequestBody(body)) => self.request_body(body).await,
            Some(Message::RequestTrailers(_)) => self.request_trailers().await,
            Some(Message::ResponseHeaders(headers)) => vec![self.response_headers(&headers, metadata.as_ref())],
            Some(Message::ResponseBody(body)) => vec![self.response_body(body)],
            Some(Message::ResponseTrailers(_)) => {
                self.end();
                vec![answer(Answer::ResponseTrailers(TrailersResponse::default()))]
            }
            // A message of a kind that this version does not know asks for nothing.
            None => Vec::new(),
        }
    }

    async fn request_headers(&mut self, headers: &HttpHeaders, metadata: Option<&Metadata>) -> Vec<ProcessingResponse> {
        let fields = read(headers.headers.as_ref());
        let field = |name: &str| fields.get(name).cloned();
        let path = field(":path").unwrap_or_default();
        self.kind = if field(":method").as_deref() == Some("POST") { Kind::of(&path) } else { Kind::Other };
        self.follows = field(&self.limits.session_header);
        self.trace = traces::HEADERS.iter().filter_map(|name| Some(((*name).to_owned(), field(name)?))).collect();
        self.urgency = Urgency::read(|name| fields.get(name).map(String::as_str), &self.router.setup.objectives);
        self.debug = fields.contains_key("x-kvcellar-debug");
        let hint = metadata::text(metadata, SUBSET);
        self.subset =
            hint.map(|hint| hint.split(',').map(|it| it.trim().to_owned()).filter(|it| !it.is_empty()).collect());
        match self.request_mode {
            _ if headers.end_of_stream => self.decide_now().await,
            // Without the body a prompt cannot be read.
            BodySendMode::None => {
                self.kind = Kind::Other;
                self.decide_now().await
            }
            BodySendMode::FullDuplexStreamed => Vec::new(),
            BodySendMode::Buffered | BodySendMode::BufferedPartial => {
                vec![answer(Answer::RequestHeaders(HeadersResponse::default()))]
            }
            BodySendMode::Streamed | BodySendMode::Grpc => {
                self.over = true;
                vec![immediate(
                    500,
                    vec![("content-type", "application/json".to_owned())],
                    r#"{"error":{"message":"the filter's request_body_mode is not supported: use FULL_DUPLEX_STREAMED or BUFFERED","type":"configuration","code":500}}"#,
                )]
            }
        }
    }

    /// A request that has no body to wait for.
    async fn decide_now(&mut self) -> Vec<ProcessingResponse> {
        if self.kind != Kind::Other {
            let refusal = Refusal::BadRequest("the request has no body".to_owned());
            return self.refuse(&refusal);
        }
        match self.decide(Bytes::new()).await {
            Ok((common, metadata, _)) => {
                vec![with(Answer::RequestHeaders(HeadersResponse { response: Some(common) }), metadata)]
            }
            Err(refusal) => self.refuse_counted(&refusal),
        }
    }

    async fn request_body(&mut self, body: HttpBody) -> Vec<ProcessingResponse> {
        let most = self.limits.body_bytes_max;
        if self.body.len() + body.body.len() > most {
            return self.refuse(&Refusal::TooLarge(most));
        }
        if self.body.is_empty() {
            self.body = body.body;
        } else {
            self.body.extend_from_slice(&body.body);
        }
        if !body.end_of_stream {
            return Vec::new();
        }
        self.body_complete(true).await
    }

    /// The body has ended by trailers instead of its last chunk.
    async fn request_trailers(&mut self) -> Vec<ProcessingResponse> {
        let mut answers = if self.ticket.is_none() { self.body_complete(false).await } else { Vec::new() };
        if !self.over {
            answers.push(answer(Answer::RequestTrailers(TrailersResponse::default())));
        }
        answers
    }

    async fn body_complete(&mut self, ends: bool) -> Vec<ProcessingResponse> {
        let body = Bytes::from(std::mem::take(&mut self.body));
        let (mut common, metadata, goes_on) = match self.decide(body.clone()).await {
            Ok(decided) => decided,
            Err(refusal) => return self.refuse_counted(&refusal),
        };
        if self.request_mode != BodySendMode::FullDuplexStreamed {
            if goes_on.as_ptr() != body.as_ptr() {
                common.body_mutation = Some(BodyMutation { mutation: Some(Mutation::Body(goes_on.to_vec())) });
                // Envoy refuses a body of another length than was announced.
                let length = set(vec![("content-length", goes_on.len().to_string())]);
                common.header_mutation.get_or_insert_default().set_headers.extend(length.set_headers);
            }
            return vec![with(Answer::RequestBody(BodyResponse { response: Some(common) }), metadata)];
        }
        let mut answers = vec![with(Answer::RequestHeaders(HeadersResponse { response: Some(common) }), metadata)];
        let body = goes_on;
        let count = body.len().div_ceil(CHUNK_BYTES).max(1);
        for number in 0..count {
            let end = body.len().min((number + 1) * CHUNK_BYTES);
            let piece = body[number * CHUNK_BYTES..end].to_vec();
            answers.push(answer(Answer::RequestBody(streamed(piece, ends && number + 1 == count))));
        }
        answers
    }

    /// Decides. Returns what Envoy is to do, and the body that goes on to the engine.
    async fn decide(&mut self, body: Bytes) -> Result<(CommonResponse, Struct, Bytes), Refusal> {
        let mut request =
            Request::read(self.kind, body).inspect_err(|refusal| self.router.metrics.refused(refusal.name()))?;
        request.session = self.follows.take();
        request.subset = self.subset.take();
        request.may_split = self.router.setup.two_steps.by == PrefillBy::Sidecar;
        request.urgency = std::mem::take(&mut self.urgency);
        request.trace = std::mem::take(&mut self.trace);
        self.router.resolve(&mut request);
        let ticket = self.router.route(&request).await?;
        let mut places = Vec::new();
        // An engine must not be told to fetch from itself.
        let is_source = |engine: &Arc<Engine>| ticket.source().is_some_and(|source| source.engine.spec == engine.spec);
        let fallbacks = ticket.fallbacks().filter(|engine| !is_source(engine)).take(self.limits.fallbacks);
        for engine in std::iter::once(ticket.engine()).chain(fallbacks) {
            if let Some(place) = engine.endpoint().await {
                places.push(place);
            }
        }
        if places.is_empty() {
            ticket.end(Outcome::Failed, None);
            return Err(Refusal::NoEngine("the chosen engine's name cannot be resolved"));
        }
        let places = places.join(",");
        let mut headers = vec![(DESTINATION, places.clone())];
        if let Some(rank) = ticket.rank() {
            headers.push((RANK, rank.to_string()));
        }
        headers.extend(ticket.prefill().map(|engine| (PREFILLER, engine.spec.authority().to_owned())));
        headers.extend(ticket.source_header().map(|(name, place)| (name, place.to_owned())));
        // What a client says of these is not the client's to say.
        let is_set = |name: &str| headers.iter().any(|(set, _)| *set == name);
        let removed = [PREFILLER, RANK, SOURCE].into_iter().filter(|name| !is_set(name)).map(str::to_owned).collect();
        headers.extend(ticket.trace_headers().map(|(name, value)| (name, value.to_owned())));
        let common = CommonResponse {
            header_mutation: Some(HeaderMutation { remove_headers: removed, ..set(headers) }),
            clear_route_cache: true,
            ..CommonResponse::default()
        };
        let body = ticket.body(request.raw);
        let told = metadata::of(places, ticket.decision(), self.debug);
        self.ticket = Some(ticket);
        Ok((common, told, body))
    }

    /// One that the router has not seen.
    fn refuse(&mut self, refusal: &Refusal) -> Vec<ProcessingResponse> {
        self.router.metrics.refused(refusal.name());
        self.refuse_counted(refusal)
    }

    fn refuse_counted(&mut self, refusal: &Refusal) -> Vec<ProcessingResponse> {
        self.over = true;
        let headers = refusal.headers().map(|(name, value)| (name, value.to_owned())).collect();
        vec![immediate(refusal.status(), headers, &refusal.body())]
    }

    fn response_headers(&mut self, headers: &HttpHeaders, metadata: Option<&Metadata>) -> ProcessingResponse {
        let fields = read(headers.headers.as_ref());
        let status: u16 = fields.get(":status").and_then(|text| text.parse().ok()).unwrap_or(0);
        self.failed = status >= 500;
        if let (Some(served), Some(ticket)) = (metadata::text(metadata, SERVED), &mut self.ticket) {
            ticket.served_by(&served);
        }
        let mut added = Vec::new();
        if let (true, Some(ticket)) = (self.debug, &self.ticket) {
            added.push(("x-kvcellar-engine", ticket.engine().spec.name.clone()));
            added.push(("x-kvcellar-decision", serde_json::to_string(ticket.decision()).unwrap_or_default()));
        }
        if let Some(late) = self.ticket.as_ref().and_then(Ticket::late_by) {
            added.push((LATE, late.as_millis().to_string()));
        }
        let mutation = (!added.is_empty()).then(|| set(added));
        if let (Some(ticket), Ok(status)) = (&self.ticket, StatusCode::from_u16(status)) {
            ticket.judge(judged_by(status));
        }
        if headers.end_of_stream {
            self.end();
        }
        let common = CommonResponse { header_mutation: mutation, ..CommonResponse::default() };
        answer(Answer::ResponseHeaders(HeadersResponse { response: Some(common) }))
    }

    fn response_body(&mut self, body: HttpBody) -> ProcessingResponse {
        self.tail.push(&body.body);
        if !body.body.is_empty() {
            self.ticket.iter().for_each(Ticket::answered);
        }
        if body.end_of_stream {
            self.end();
        }
        let response = match self.response_mode {
            BodySendMode::FullDuplexStreamed => streamed(body.body, body.end_of_stream),
            _ => BodyResponse { response: Some(CommonResponse::default()) },
        };
        answer(Answer::ResponseBody(response))
    }

    fn end(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            ticket.end(if self.failed { Outcome::EngineError } else { Outcome::Done }, self.tail.usage());
        }
    }
}

fn answer(response: Answer) -> ProcessingResponse {
    ProcessingResponse { response: Some(response), ..ProcessingResponse::default() }
}

fn with(response: Answer, metadata: Struct) -> ProcessingResponse {
    ProcessingResponse { dynamic_metadata: Some(metadata), ..answer(response) }
}

fn streamed(body: Vec<u8>, end_of_stream: bool) -> BodyResponse {
    let mutation = Mutation::StreamedResponse(StreamedBodyResponse { body, end_of_stream, ..Default::default() });
    let body_mutation = Some(BodyMutation { mutation: Some(mutation) });
    BodyResponse { response: Some(CommonResponse { body_mutation, ..CommonResponse::default() }) }
}

fn immediate(status: u16, headers: Vec<(&str, String)>, body: &str) -> ProcessingResponse {
    answer(Answer::ImmediateResponse(ImmediateResponse {
        status: Some(HttpStatus { code: status.into() }),
        headers: Some(set(headers)),
        body: body.as_bytes().to_vec(),
        ..ImmediateResponse::default()
    }))
}

fn set(headers: Vec<(&str, String)>) -> HeaderMutation {
    let option = |(key, value): (&str, String)| HeaderValueOption {
        header: Some(HeaderValue { key: key.to_owned(), raw_value: value.into_bytes(), ..HeaderValue::default() }),
        append_action: HeaderAppendAction::OverwriteIfExistsOrAdd.into(),
        ..HeaderValueOption::default()
    };
    HeaderMutation { set_headers: headers.into_iter().map(option).collect(), remove_headers: Vec::new() }
}

fn read(headers: Option<&HeaderMap>) -> HashMap<String, String> {
    let value = |it: &HeaderValue| {
        if it.raw_value.is_empty() { it.value.clone() } else { String::from_utf8_lossy(&it.raw_value).into_owned() }
    };
    headers.map_or_else(HashMap::new, |map| map.headers.iter().map(|it| (it.key.to_lowercase(), value(it))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::choose::Policy;
    use crate::engine::Told;
    use crate::engines::Engines;

    use crate::router::{Mode, Setup};

    use crate::two_steps::{PrefillBy, TwoSteps};
    use crate::upstream::{Upstream, UpstreamOptions};

    fn router(engines: usize, by: PrefillBy) -> Arc<Router> {
        let known = Arc::new(Engines::default());
        let role = |number| if number == 0 { ",role=prefill" } else { "" };
        let spec = |number| {
            let text = format!("url=http://10.0.0.{number}:8000,name=e{number}{}", role(number));
            kvcellar_discovery::parse(&text).expect("an engine")
        };
        known.set((0..=engines).map(spec).collect());
        for engine in known.all().iter() {
            engine.heard(Told::default());
        }
        let setup = Setup { two_steps: TwoSteps { by, tokens_min: 1 }, ..Setup::new(Mode::None, Policy::RoundRobin) };
        Router::new(known, Upstream::open(&UpstreamOptions::default()).expect("no files"), setup)
    }

    /// The headers that Envoy is told to set for one completion; those to remove have a `-` in
    /// front.
    async fn headers(router: Arc<Router>, fallbacks: usize) -> HashMap<String, String> {
        let session_header = "x-session-id".to_owned();
        let limits = Arc::new(PickerLimits { body_bytes_max: 1 << 20, fallbacks, session_header });
        let mut session = PickerSession::new(router, limits);
        let fields = [(":method", "POST"), (":path", "/v1/completions")];
        let headers = fields.map(|(key, value)| HeaderValue {
            key: key.to_owned(),
            raw_value: value.as_bytes().to_vec(),
            ..HeaderValue::default()
        });
        let headers = HttpHeaders { headers: Some(HeaderMap { headers: headers.into() }), ..HttpHeaders::default() };
        let body = HttpBody { body: br#"{"prompt": "one two"}"#.to_vec(), end_of_stream: true, ..HttpBody::default() };
        let mut answers = Vec::new();
        for message in [Message::RequestHeaders(headers), Message::RequestBody(body)] {
            let message = ProcessingRequest { request: Some(message), ..ProcessingRequest::default() };
            answers.extend(session.take(message).await);
        }
        let Some(Answer::RequestHeaders(answer)) = answers.swap_remove(0).response else { return HashMap::new() };
        let Some(mutation) = answer.response.and_then(|common| common.header_mutation) else { return HashMap::new() };
        let removed = mutation.remove_headers.iter().map(|name| (format!("-{name}"), String::new()));
        let removed: Vec<_> = removed.collect();
        let field = |option: HeaderValueOption| {
            option.header.map(|it| (it.key, String::from_utf8_lossy(&it.raw_value).into_owned()))
        };
        mutation.set_headers.into_iter().filter_map(field).chain(removed).collect()
    }

    #[tokio::test]
    async fn further_engines_are_named_for_gateways_that_try_them() {
        for (fallbacks, named) in [(0, 1), (1, 2), (5, 3)] {
            let found = headers(router(3, PrefillBy::Router), fallbacks).await;
            let engines: Vec<_> = found[DESTINATION].split(',').collect();
            assert_eq!(engines.len(), named, "{found:?}");
            let different: std::collections::HashSet<_> = engines.iter().collect();
            assert!(different.len() == named && !engines.contains(&"10.0.0.0:8000"), "{engines:?}");
        }
    }

    #[tokio::test]
    async fn a_sidecar_is_told_who_computes_the_prompt() {
        assert_eq!(headers(router(1, PrefillBy::Sidecar), 0).await[PREFILLER], "10.0.0.0:8000");
        let found = headers(router(1, PrefillBy::Router), 0).await;
        assert!(!found.contains_key(PREFILLER), "nobody would ask there");
        // Nor where a client says.
        assert!(
            found.contains_key("-x-prefiller-host-port") && found.contains_key("-x-data-parallel-rank"),
            "{found:?}"
        );
    }
}
