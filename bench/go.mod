module github.com/fleetquota/fleetquota/bench

go 1.26.0

require (
	github.com/fleetquota/fleetquota v0.0.0
	golang.org/x/time v0.16.0
)

replace github.com/fleetquota/fleetquota => ../
