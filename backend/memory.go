package backend

import (
	"context"
	"fmt"
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
		return nil, refused("the memory URL has a host, a path, credentials or a fragment; accepted: memory:// and memory://?max_keys=N&max_ids=N")
	}
	q := u.Query()
	var o local.Options
	for name, bound := range map[string]*int{"max_keys": &o.MaxKeys, "max_ids": &o.MaxIDs} {
		values, there := q[name]
		if !there {
			continue
		}
		n, err := strconv.ParseInt(values[0], 10, 32)
		if err != nil || n < 1 {
			return nil, refused("parameter %s is %s; accepted: a whole number from 1 to %d", name, bounded(values[0]), math.MaxInt32)
		}
		if len(values) > 1 {
			return nil, refused("parameter %s comes %d times; accepted: once", name, len(values))
		}
		*bound = int(n)
		q.Del(name)
	}
	if len(q) > 0 {
		var names []string
		for name := range q {
			names = append(names, bounded(name))
		}
		slices.Sort(names)
		return nil, refused("unknown parameter of the memory URL: %s; accepted: max_keys, max_ids", strings.Join(names, ", "))
	}
	return local.NewWithOptions(o)
}

// refused is invalid without the name of the package, which Open adds to errors of drivers.
func refused(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{quota.ErrInvalid}, args...)...)
}
