package backend

import (
	"context"
	"math"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/quota"
)

// openMemory opens memory://. It refuses a host, a path or credentials without quoting them: such a URL was
// most likely meant for another store, and any part of it may belong to a password.
func openMemory(_ context.Context, u *url.URL) (quota.Store, error) {
	if u.User != nil || u.Host != "" || u.Path != "" && u.Path != "/" || u.Fragment != "" {
		return nil, invalid("the memory URL has a host, a path, credentials or a fragment; accepted: memory:// and memory://?max_keys=N")
	}
	q := u.Query()
	o := &local.Options{}
	if values, there := q["max_keys"]; there {
		n, err := strconv.ParseInt(values[0], 10, 32)
		if err != nil || n < 1 {
			return nil, invalid("parameter max_keys is %s; accepted: a whole number from 1 to %d", bounded(values[0]), math.MaxInt32)
		}
		if len(values) > 1 {
			return nil, invalid("parameter max_keys comes %d times; accepted: once", len(values))
		}
		o.MaxKeys = int(n)
		q.Del("max_keys")
	}
	if len(q) > 0 {
		var names []string
		for name := range q {
			names = append(names, bounded(name))
		}
		slices.Sort(names)
		return nil, invalid("unknown parameter of the memory URL: %s; accepted: max_keys", strings.Join(names, ", "))
	}
	return local.New(o), nil
}
