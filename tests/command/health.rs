//! What gateways and charts ask of the picker's health service.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

const NAMES: [&str; 4] = ["", "readiness", "inference-extension", "envoy.service.ext_proc.v3.ExternalProcessor"];

#[tokio::test]
async fn readiness_follows_the_engines_and_unknown_names_are_not_found() {
    let (health, service) = tonic_health::server::health_reporter();
    let ready = Arc::new(AtomicBool::new(false));
    let asked = Arc::clone(&ready);
    tokio::spawn(async move { kvcellar_command::health::keep(&health, || asked.load(Ordering::Relaxed)).await });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{address}")).expect("an address");
    let mut client = HealthClient::new(endpoint.connect().await.expect("a connection"));
    for wanted in [ServingStatus::NotServing, ServingStatus::Serving] {
        ready.store(wanted == ServingStatus::Serving, Ordering::Relaxed);
        for name in NAMES {
            let mut tries = 0;
            // Before the first look a name is not known yet.
            while client
                .check(HealthCheckRequest { service: name.to_owned() })
                .await
                .map_or(true, |answer| answer.into_inner().status() != wanted)
            {
                tries += 1;
                assert!(tries < 3000, "{name:?} is not {wanted:?}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        let alive = client.check(HealthCheckRequest { service: "liveness".to_owned() }).await.expect("an answer");
        assert_eq!(alive.into_inner().status(), ServingStatus::Serving);
    }
    let unknown = client.check(HealthCheckRequest { service: "another".to_owned() }).await;
    assert_eq!(unknown.expect_err("no such service").code(), tonic::Code::NotFound);
}
