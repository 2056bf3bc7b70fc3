//! Traces of requests, sent by OTLP: one span for each, from its decision to the end of its answer,
//! as a child of the caller's and the parent of the engine's.
//!
//! Spans carry counts and names, never tokens or text. Sampling follows `OTEL_TRACES_SAMPLER`, and
//! the caller's own choice; what cannot be sent is dropped by the exporter's own thread, and
//! requests never wait for it.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{Span, SpanKind, Status, TraceContextExt, Tracer, TracerProvider};
use opentelemetry::{Context, KeyValue};
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider, Span as SdkSpan};

use super::outcome::Outcome;
use super::see::Decision;
use kvcellar_block::error::{Error, Result};

/// Headers that carry a trace from process to process (W3C Trace Context).
pub const HEADERS: [&str; 2] = ["traceparent", "tracestate"];

/// How long the last spans may take to be sent at a stop.
const FLUSH: Duration = Duration::from_secs(2);

/// Where traces go.
#[derive(Debug)]
pub struct Traces {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
    form: TraceContextPropagator,
}

/// One request's span. Ends when it is dropped, if not before.
#[derive(Debug)]
pub struct Trace {
    span: SdkSpan,
    headers: HashMap<String, String>,
}

impl Traces {
    /// Sends to a collector's gRPC endpoint, e.g. `http://127.0.0.1:4317`. To be called within a
    /// runtime.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn open(endpoint: &str) -> Result<Self> {
        let wrong = |problem: String| {
            Error::config("otlp", problem, "Write the collector's gRPC endpoint, e.g. http://127.0.0.1:4317")
        };
        if !endpoint.starts_with("http://") {
            return Err(wrong(format!("`{endpoint}` does not begin with http://")));
        }
        let exporter = SpanExporter::builder().with_tonic().with_endpoint(endpoint).build();
        let exporter = exporter.map_err(|error| wrong(error.to_string()))?;
        let resource = Resource::builder().with_service_name("kvcellar-route").build();
        let provider = SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build();
        Ok(Self { tracer: provider.tracer("kvcellar"), provider, form: TraceContextPropagator::new() })
    }

    /// A request has come, with these of its headers.
    pub fn begin(&self, headers: &HashMap<String, String>, at: SystemTime) -> Trace {
        let caller = self.form.extract_with_context(&Context::new(), headers);
        let span = self.tracer.span_builder("route").with_kind(SpanKind::Server).with_start_time(at);
        let span = span.start_with_context(&self.tracer, &caller);
        let mut passed = HashMap::new();
        let here = Context::new().with_remote_span_context(span.span_context().clone());
        self.form.inject_context(&here, &mut passed);
        passed.retain(|_, value| !value.is_empty());
        Trace { span, headers: passed }
    }

    /// Sends what is left. Blocks for a moment.
    pub fn close(&self) {
        if let Err(error) = self.provider.shutdown_with_timeout(FLUSH) {
            log::warn!("the last traces were not sent: {error}");
        }
    }
}

impl Trace {
    /// Headers that make the engine's spans children of this one.
    pub fn headers(&self) -> &HashMap<String, String> {
        &self.headers
    }

    /// It was not passed on.
    pub fn refused(mut self, reason: &'static str) {
        self.span.set_attribute(KeyValue::new("kvcellar.refused", reason));
        self.span.set_status(Status::error(reason));
        self.span.end();
    }

    /// It has ended; its first byte came then.
    pub fn end(&mut self, decision: &Decision, first_byte: Option<SystemTime>) {
        let count = |name: &'static str, count: u32| KeyValue::new(name, i64::from(count));
        let mut attributes = vec![
            KeyValue::new("kvcellar.engine", decision.engine.clone()),
            KeyValue::new("kvcellar.prefix_from", decision.prefix_from.as_str()),
            KeyValue::new("kvcellar.tokens_from", decision.tokens_from),
            KeyValue::new("kvcellar.outcome", decision.outcome.as_str()),
            KeyValue::new("kvcellar.decided_us", i64::try_from(decision.took_us).unwrap_or(i64::MAX)),
            count("kvcellar.prompt_tokens", decision.prompt_tokens),
            count("kvcellar.predicted_cached_tokens", decision.predicted_cached),
        ];
        attributes.extend(decision.model.clone().map(|model| KeyValue::new("gen_ai.request.model", model)));
        attributes.extend(decision.inexact.map(|reason| KeyValue::new("kvcellar.inexact", reason)));
        attributes.extend(decision.reported_prompt.map(|tokens| count("gen_ai.usage.input_tokens", tokens)));
        attributes.extend(decision.reported_cached.map(|tokens| count("kvcellar.reported_cached_tokens", tokens)));
        self.span.set_attributes(attributes);
        if let Some(at) = first_byte {
            self.span.add_event_with_timestamp("first byte", at, Vec::new());
        }
        self.span.set_status(match decision.outcome {
            Outcome::Done => Status::Ok,
            other => Status::error(other.as_str()),
        });
        self.span.end();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex, PoisonError};

    use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
    use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
    use opentelemetry_proto::tonic::trace::v1::Span as Sent;

    use super::super::prefix_source::PrefixSource;
    use super::super::see::ChoiceReason;
    use super::*;

    /// A collector that keeps what it gets.
    #[derive(Default, Clone)]
    struct Collector(Arc<Mutex<Vec<Sent>>>);

    #[tonic::async_trait]
    impl TraceService for Collector {
        async fn export(
            &self,
            request: tonic::Request<ExportTraceServiceRequest>,
        ) -> std::result::Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
            let spans = request.into_inner().resource_spans.into_iter().flat_map(|it| it.scope_spans);
            self.0.lock().unwrap_or_else(PoisonError::into_inner).extend(spans.flat_map(|it| it.spans));
            Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
        }
    }

    fn decision() -> Decision {
        Decision {
            why: ChoiceReason::Prefix,
            predicted_wait_s: 0.0,
            predicted_ttft_s: 0.5,
            id: 1,
            at_ms: 0,
            model: Some("m".to_owned()),
            prompt_tokens: 100,
            tokens_from: "local",
            inexact: None,
            prefix_from: PrefixSource::Index,
            prefill: None,
            source: None,
            engine: "a".to_owned(),
            predicted_cached: 64,
            considered: Vec::new(),
            took_us: 12,
            outcome: Outcome::Done,
            reported_prompt: Some(100),
            reported_cached: Some(48),
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_collector_gets_the_callers_child_with_its_counts() {
        let collector = Collector::default();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        let service = TraceServiceServer::new(collector.clone());
        tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
        let traces = Traces::open(&format!("http://{address}")).expect("an exporter");
        let caller = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let headers = HashMap::from([("traceparent".to_owned(), caller.to_owned())]);
        let now = SystemTime::now();
        let mut trace = traces.begin(&headers, now);
        let passed = trace.headers()["traceparent"].clone();
        assert!(passed.starts_with("00-0af7651916cd43dd8448eb211c80319c-") && !passed.contains("b7ad6b7169203331"));
        trace.end(&decision(), Some(now));
        traces.begin(&HashMap::new(), now).refused("shed");
        tokio::task::spawn_blocking(move || traces.close()).await.expect("closed");
        let sent = collector.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        assert_eq!(sent.len(), 2);
        assert_eq!(sent[0].parent_span_id, 0xb7ad_6b71_6920_3331_u64.to_be_bytes());
        let own = u64::from_str_radix(passed.split('-').nth(2).unwrap_or_default(), 16);
        assert_eq!(own.map(u64::to_be_bytes).ok().as_ref().map(<[u8; 8]>::as_slice), Some(sent[0].span_id.as_slice()));
        assert_eq!((sent[0].events.len(), sent[0].status.as_ref().map(|it| it.code)), (1, Some(1)));
        let said = format!("{:?}", sent[0].attributes);
        assert!(said.contains("kvcellar.predicted_cached_tokens") && said.contains("IntValue(64)"), "{said}");
        assert!(sent[1].parent_span_id.is_empty() && sent[1].status.as_ref().is_some_and(|it| it.code == 2));
    }

    #[tokio::test]
    async fn a_caller_who_does_not_sample_is_followed() {
        let traces = Traces::open("http://127.0.0.1:9").expect("an exporter");
        let caller = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";
        let headers = HashMap::from([("traceparent".to_owned(), caller.to_owned())]);
        let trace = traces.begin(&headers, SystemTime::now());
        assert!(trace.headers()["traceparent"].ends_with("-00") && !trace.span.is_recording());
        assert!(Traces::open("127.0.0.1:4317").expect_err("no scheme").to_string().contains("http://"));
    }
}
