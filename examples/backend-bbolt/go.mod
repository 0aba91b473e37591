module github.com/fleetquota/fleetquota/examples/backend-bbolt

go 1.26.0

require (
	github.com/fleetquota/fleetquota v0.0.0
	go.etcd.io/bbolt v1.5.0
)

require (
	github.com/anishathalye/porcupine v1.3.1 // indirect
	golang.org/x/sys v0.48.0 // indirect
)

replace github.com/fleetquota/fleetquota => ../..
