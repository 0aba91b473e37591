// Package redisfault injects the conformance suite's faults into a real redis-server.
package redisfault

import (
	"testing"

	"github.com/fleetquota/fleetquota/conformance"
	"github.com/fleetquota/fleetquota/internal/redisserver"
)

// Set returns what sets the fault of a server whose store goes through the proxy. A server that cannot be
// paused or resumed is an error of the test.
func Set(t testing.TB, server *redisserver.Server, proxy *redisserver.Proxy) func(conformance.Fault) {
	return func(f conformance.Fault) {
		proxy.Clear()
		err := server.Resume()
		switch f {
		case conformance.Refused:
			proxy.Inject(redisserver.Fault{Action: redisserver.DropRequest})
		case conformance.LostReply:
			proxy.Inject(redisserver.Fault{Action: redisserver.DropReply, Match: redisserver.Commands("EVAL", "EVALSHA")})
		case conformance.Frozen:
			err = server.Pause()
		}
		if err != nil {
			t.Error(err)
		}
	}
}
