"""The wire contract: `fp8scope_protos.v1.telemetry_pb2` and `telemetry_pb2_grpc`, generated from telemetry.proto."""
